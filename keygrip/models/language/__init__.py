"""Language models and tokenizers behind one interface."""

from typing import Literal

# Images before all text of a prompt, or after the question (of a policy: the instruction).
PromptOrder = Literal["visual_first", "question_first"]
