"""What trained models make of inputs from outside: images drawn, questions answered."""
