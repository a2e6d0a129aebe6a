"""Forty forms in which models answer multiple-choice questions, and what must not be read as an answer."""

from __future__ import annotations

import pytest

from keygrip.evaluation.chosen_options import chosen_option

COLOURS = ["blue", "red", "dark green", "a person jumps"]
FORMS = [
    *(("B", 1), ("b", 1), ("B.", 1), ("(B)", 1), ("(b)", 1), ("[B]", 1), ("B)", 1), ("B:", 1), ("**B**", 1)),
    *(("**B.** red", 1), ("`B`", 1), ('"B"', 1), ("$\\boxed{B}$", 1), ("\\boxed{\\text{B}}", 1)),
    *(("<answer>B</answer>", 1), ("B. red", 1), ("B) red", 1), ("B: red", 1), ("B - red", 1), ("B red", 1)),
    *(("(B) red", 1), ("C) a", 2), ("Answer: B", 1), ("answer: b", 1), ("ANSWER: B", 1), ("Answer - B", 1)),
    *(("The answer is B.", 1), ("The answer is (B).", 1), ("The correct answer is B, red.", 1), ("Option B", 1)),
    *(("The correct option is: **B**", 1), ("Best option: (B)", 1), ("I would choose B.", 1), ("It is B.", 1)),
    *(("Final answer: B", 1), ("So, the final answer is option B.", 1), ("B is correct.", 1), ("(B) is right", 1)),
    *(("The answer is A? No: the answer is B.", 1), ("The cube is red, so (B).", 1), ("red", 1), ("Red.", 1)),
    *(("It is red.", 1), ("The cube is dark green.", 2), ("Therefore, C", 2), ("A person jumps", 3)),
    *(("Let me think. A cube is held by a hand. Answer: D", 3), ("D. A person jumps", 3), ("A: blue", 0)),
    *(("<think>\nA cube. The answer is A? No.\n</think>\n\nB", 1), ("It may be A.</think>The answer is B", 1)),
    *(
        ("<think>A</think><answer>B</answer>", 1),
        ("<answer>\n(B) red\n</answer>", 1),
        ("\uff22", 1),
        ("\uff08B\uff09", 1),
    ),
    *(
        ("\u7b54\u6848\u662fB\u3002", 1),
        ("\u9009B", 1),
        ("\u7b54\u6848\uff1aB", 1),
        ("\u6b63\u89e3\u306fB\u3067\u3059", 1),
    ),
    *(("A. blue\nB. red\nC. dark green\nD. a person jumps\nAnswer: B", 1), ("B\nA cube is red.", 1), ("B\n\nA", 1)),
    *(("(A) blue (B) red (C) dark green (D) a person jumps\n\nThe best option is (B).", 1), ("[[B]]", 1)),
    *(("A, B and C are wrong, so D.", 3), ('{"answer": "B"}', 1), ("B</s>", 1), ("#### B", 1), ("```\nB\n```", 1)),
    *(("The red cube, which corresponds to option (B).", 1), ("I'd go with B.", 1), ("Assistant: B", 1)),
    *(("Option A is incorrect. Option B is correct.", 1), ("The final answer is $\\boxed{\\text{B. red}}$.", 1)),
    *(("ans: b", 1), ("<B>", 1), ("A: incorrect. B: correct. The answer is B.", 1), ("B. red\nThe answer is C", 1)),
    *(("While A is plausible, B is correct.", 1), ("The answer is not (A); it is (B).", 1), ("red (B)", 1)),
    *(("I think the answer is A.", 0), ("The answer is A person jumps", 3), ("Not A, but B", 1)),
    *(("B because it is red", 1), ("A since the cube is blue", 0)),
]
NONE = ["E", "none", "", "red or blue", "A cube lies there", "I cannot tell", "A or B", "Because", "Cubes are shown."]
NONE += ["A, B", "A/B", "A; B and C", "<think>The answer is A", "A. blue\nB. red\nC. dark green\nD. a person jumps"]
NONE += ["The answer is neither A nor B", "Option A or option B", "Either A or B."]
NONE += ["The answer is not B", "It could be A, B, or C."]


@pytest.mark.parametrize(("said", "option"), FORMS)
def test_an_option_is_named_by_letter_or_words(said: str, option: int) -> None:
    assert chosen_option(said, COLOURS) == option


@pytest.mark.parametrize("said", NONE)
def test_what_names_none_or_several(said: str) -> None:
    assert chosen_option(said, COLOURS) is None


def test_of_options_that_are_letters_the_letter_of_the_list_counts() -> None:
    assert chosen_option("B", ["B", "A", "C"]) == 1
    assert chosen_option("The answer is B.", ["B", "A", "C"]) == 1


def test_letters_reach_as_far_as_the_options() -> None:
    assert chosen_option("C", ["yes", "no"]) is None
    assert chosen_option("The answer is E.", ["a", "b", "c", "d", "e"]) == 4
