"""Language models and tokenizers behind one interface."""
