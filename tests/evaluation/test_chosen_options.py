"""Forty forms in which models answer multiple-choice questions, and what must not be read as an answer."""

from __future__ import annotations

import re

import pytest

from keygrip.evaluation import chosen_options, joined_letters, named_options
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
    *(("C.C.C.", 2), ("C.C.", 2), ("B.\nB.\nB.", 1), ("d.d.d.", 3), ("A.A.A", 0), ("**C.C.C.**", 2)),
    *(("opt b", 1), ("Opt b.", 1), ("opt. b", 1), ("opt: b", 1), ("opt (b)", 1), ("Opt B", 1)),
    *(("The answer is opt b", 1), ("not opt a, opt b", 1), ("I opt for b.", 1)),
]
SENTENCES = [
    ("The answer is B because the person pulls the handle.", 1),
    ("The correct answer is B as shown in the video", 1),
    ("Answer: B because the handle is pulled", 1),
    ("Answer: B the person pulls the handle", 1),
    ("I choose B because it is pulled", 1),
    ("I'd go with C over option B.", 2),
    ("The answer is **B** because it is pulled", 1),
    ("My choice is B because it is pulled", 1),
    ("B is the answer.", 1),
    ("I think B is the answer.", 1),
    ("B is the most likely answer.", 1),
    ("Option B is the most likely answer.", 1),
    ("The correct option is B in this video", 1),
    ("Option B best describes the video", 1),
    ("The answer is B and not A.", 1),
    ("B and not A", 1),
    ("The answer is B rather than option C.", 1),
    ("The answer is D which option C is not.", 3),
    ("A: no. B: yes. Therefore, B.", 1),
    ("A) no B) yes. So B.", 1),
    ("A: no. B: yes. B is the answer.", 1),
    ("Option A: no. Option B: yes. Option C: no. So B.", 1),
    ("The answer is A because the person pulls.", 0),
    ("The answer is A as shown.", 0),
    ("Answer: A and not B", 0),
    ("A is the most likely answer.", 0),
    ("Answer: B is incorrect, so C is the answer.", 2),
    ("I don't think B is the answer. The answer is C since it is pulled", 2),
    ("Is the answer B? No, option C.", 2),
    ("Clearly C because it is pulled", 2),
    ("The wrong answer is A. It is D.", 3),
]
NONE = ["E", "none", "", "red or blue", "A cube lies there", "I cannot tell", "A or B", "Because", "Cubes are shown."]
NONE += ["A, B", "A/B", "A; B and C", "<think>The answer is A", "A. blue\nB. red\nC. dark green\nD. a person jumps"]
NONE += ["C.D.", "A.B.C.", "CCC", "opt a or opt b", "Opt A or Opt B", "Option A or Option B", "not opt b", "opt e"]
NONE += ["They opt a lot", "From the U.S.A.", "The A.A. helps."]
NONE += ["The answer is neither A nor B", "Option A or option B", "Either A or B."]
NONE += ["The answer is not B", "It could be A, B, or C."]
NONE += [
    "The answer is A person jumping",
    "Answer: A man jumps",
    "I choose A man",
    "So A person is seen",
    "B shows a man",
]
NONE += ["The answer is not B because of it", "I don't think B is the answer.", "Neither A nor B is the answer"]
NONE += [
    "The answer is (B) or (C)",
    "The answer is B or C",
    "B is the least likely answer",
    "Option B is not the answer",
]
NONE += ["Option A shows a man and option B shows a dog", "Option A as well as option B show a man"]


@pytest.mark.parametrize(("said", "option"), [*FORMS, *SENTENCES])
def test_an_option_is_named_by_letter_or_words(said: str, option: int) -> None:
    assert chosen_option(said, COLOURS) == option


@pytest.mark.parametrize("said", NONE)
def test_what_names_none_or_several(said: str) -> None:
    assert chosen_option(said, COLOURS) is None


def test_of_options_that_are_letters_the_letter_of_the_list_counts() -> None:
    assert chosen_option("B", ["B", "A", "C"]) == 1
    assert chosen_option("The answer is B.", ["B", "A", "C"]) == 1


XYZ, YES_NO, REDS = ["x", "y", "z"], ["Yes", "No"], ["red", "dark red", "blue", "green"]
NAMES, ROMAN = ["Anna", "Bob", "I", "Dr. A"], ["I", "II", "III", "IV"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *((said, NAMES, 2) for said in ("I", "I.", "(I)", "**I**", '"I"', "i", "I\n", "C. I", "C", "It's I!")),
        *((said, NAMES, 2) for said in ("The answer is I", "Answer: I.", "I, since he is alone", "Not Bob but I.")),
        *(("I think it is Bob", NAMES, 1), ("Bob, I think", NAMES, 1), ("Bob, i.e. the man", NAMES, 1)),
        *((said, NAMES, None) for said in ("I don't know", "I see nobody.", "Bob and I.", "not I.", "I.e.")),
        *(("A", NAMES, 0), ("Dr. A", NAMES, 3), ("D", NAMES, 3)),
        *(
            ("I", ROMAN, 0),
            ("The answer is I.", ROMAN, 0),
            ("II", ROMAN, 1),
            ("A. I", ROMAN, 0),
            ("I, II", ROMAN, None),
        ),
        *(("I", ["1", "2", "3", "I", "5", "6", "7", "8", "9"], 8), ("Well: I.", [*"123I56789"], 8)),
        *(("D", ["D", "A", "C"], 0), ("D", ["D", "A", "C", "B"], 3), ("X", ["Y", "X"], 1), ("B.B.B.", ["B", "A"], 1)),
        *(("C.C.C.", ["C.C.", "C.C.C.", "C."], 1), ("A, A", ["A, B", "A, A"], 1)),
    ],
)
def test_an_option_that_is_one_letter_is_named_by_it_where_the_list_has_no_such_letter(
    said: str, options: list[str], option: int | None
) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *((said, None) for said in ("I and II", "I or II", "Both I and II", "Either I or III", "I/II", "I & II")),
        *((said, None) for said in ("I and III are correct", "III and I are correct", "II or I is right")),
        *((said, None) for said in ("Option I or Option II", "I or maybe II", "It shows both I and (III).")),
        *(("Not I but II", 1), ("Neither I nor II, but III", 2), ("not I or II but III", 2)),
        *(("It must be II and I am sure", 1), ("I and my friend see II", 1), ("I think II", 1), ("II, I think", 1)),
        ("It is II, or I would be surprised", 1),
        *((said, None) for said in ("II or I may be right", "Both II and I seem right")),
        *((said, 0) for said in ("I is correct", "Option I is correct", "Only I is correct.", "I think I is correct")),
        *(("Statement I is true", 0), ("Option II is correct", 1)),
    ],
)
def test_an_option_i_beside_another_makes_two(said: str, option: int | None) -> None:
    assert chosen_option(said, ROMAN) == option


def test_an_option_no_beside_another_makes_two() -> None:
    options = ["Yes", "No", "Maybe"]
    for said in ("It is no or maybe", "Yes or no is right here", "I would say no/maybe"):
        assert chosen_option(said, options) is None
    for said in ("It is hard to give a yes or no answer.", "The answer is either yes or no.", "Both yes and no apply."):
        assert chosen_option(said, options) is None
    for said, option in (("There is no cat: maybe", 2), ("Yes, and no doubt is left", 0), ("Yes, no doubt", 0)):
        assert chosen_option(said, options) == option


@pytest.mark.parametrize("options", [["I", "II", "III"], ["I", "II", "III", "I and II"]], ids=["three", "joined"])
@pytest.mark.parametrize(
    ("said", "option"),
    [
        *((said, 1) for said in ("I was thinking II", "I was not sure, it shows II", "I was right: II")),
        *((said, 1) for said in ("Although I was unsure, II is shown", "When I was looking I saw II")),
        *((said, 1) for said in ("I was able to see that II is right", "II is correct. I was sure")),
        *(("After what I saw, I was convinced: II.", 1), ("I was not sure", None)),
        *((said, 1) for said in ("I is wrong, II is right", "I is incorrect. II fits", "Statement I is false, so II")),
        *((said, 1) for said in ("I seems wrong, II", "Statement I may be true but II is the answer")),
        *(("I is not correct; it must be III", 2), ("I seems wrong so III", 2), ("II was wrong, so it is III", 2)),
        *(("II is wrong, I is right", 0), ("I is right, II is wrong", 0), ("II is right and I is wrong", 1)),
        *(("I and II are wrong, III is right", 2), ("Both I and II are false, so III", 2), ("I is not wrong", 0)),
        *(("Statement I may be true", 0), ("Option I was right", 0), ("II or I may be right", None)),
        ("Statement II may be true but I is the answer", 0),
        *((said, None) for said in ("II doesn't contradict the image, but III does", "II is not at all wrong, III is")),
        *((said, None) for said in ("II is not ruled out by the image; III is.", "II is not contradicted by I")),
        *(
            (said, 1)
            for said in ("II isn't wrong.", "II cannot be denied.", "II is less detailed than III, but correct.")
        ),
        *((said, 1) for said in ("Only II is false", "Answer: II is false.", "The answer is: II is incorrect")),
        *(("III is not ruled out", 2), ("I isn't correct, III is", 2)),
    ],
)
def test_an_option_i_is_no_pronoun_and_one_that_is_said_to_be_wrong_is_not_named(
    said: str, option: int | None, options: list[str]
) -> None:
    assert chosen_option(said, options) == option


def test_of_options_that_are_joined_the_whole_one_is_named() -> None:
    options = ["I", "II", "III", "I and II"]
    for said in ("I and II", "I and II are correct", "Both I and II", "I and II are right, not III"):
        assert chosen_option(said, options) == 3


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("This is a yes or no question, and the answer is yes.", 0), ("To the yes/no question I say yes", 0)),
        *(("This is a yes or no question. Yes, there is a cat.", 0), ("Yes or no? Yes.", 0), ("Yes or no? No.", 1)),
        *(("This is a yes-or-no question: no.", 1), ("A yes or no question: B", 1)),
        *((said, None) for said in ("yes or no", "Either yes or no", "A yes or no answer is not possible.")),
        *((said, None) for said in ("Yes/No", "Yes and no.", "No or yes")),
    ],
)
def test_yes_or_no_is_the_kind_of_a_question_and_no_answer(said: str, option: int | None) -> None:
    assert chosen_option(said, YES_NO) == option
    assert chosen_option(said, [*YES_NO, "Maybe"]) == option


def test_yes_or_no_among_other_options_stays() -> None:
    for said in ("Yes or no or maybe", "maybe, yes or no"):
        assert chosen_option(said, [*YES_NO, "Maybe"]) is None
    assert chosen_option("It is yes and no, I think", [*YES_NO, "Yes and no"]) == 2


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("A: no. B: no. C: yes.", 2), ("A: no. B: yes. C: no.", 1), ("A: yes. B: no. C: no.", 0)),
        *(("A. No. B. No. C. Yes.", 2), ("A: wrong\nB: wrong\nC: right", 2), ("(A) no; (B) yes", 1)),
        *(("A: no. B: no. C: no.", None), ("A: yes. B: yes. C: no.", None)),
    ],
)
def test_of_letters_with_a_verdict_each_the_one_that_is_right_is_named(said: str, option: int | None) -> None:
    assert chosen_option(said, XYZ) == option


def test_letters_reach_as_far_as_the_options() -> None:
    assert chosen_option("C", ["yes", "no"]) is None
    assert chosen_option("The answer is E.", ["a", "b", "c", "d", "e"]) == 4


def test_words_of_an_option_that_begin_with_a_letter_are_words() -> None:
    assert chosen_option("The answer is C major", ["D minor", "C major", "B flat"]) == 1
    assert chosen_option("Answer: B flat since it is low", ["D minor", "C major", "B flat"]) == 2
    assert chosen_option("The answer is C because it is low", ["D minor", "C major", "B flat"]) == 2


def test_the_ninth_letter_is_also_a_word() -> None:
    options = [str(number) for number in range(1, 10)]
    assert chosen_option("Answer: I think it is H because of it", options) == 7
    assert chosen_option("The answer is I because of it", options) == 8
    assert chosen_option("The answer is I.", options) == 8


@pytest.mark.parametrize(
    ("said", "options"),
    [
        *(("", ["A", "B", "C"]), ("...", ["A", "B", "C"]), ("the", ["A", "B"]), ("<think>never ends", ["A", "B"])),
        ("", ["-", "left", "right"]),
    ],
)
def test_no_words_are_no_answer_though_an_option_is_an_article_or_a_sign(said: str, options: list[str]) -> None:
    assert chosen_option(said, options) is None


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("C++", ["C", "C++", "C#"], 1), ("The answer is C++.", ["C", "C++", "C#"], 1), ("C#", ["C", "C++", "C#"], 2)),
        *(("-5", ["5", "-5"], 1), ("The answer is -5.", ["5", "-5"], 1), ("50%", ["50", "50%"], 1)),
        *(("3:30", ["3:30", "3 30"], 0), ("B. C", ["A", "C", "B"], 1)),
    ],
)
def test_signs_tell_options_apart(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        ("It is not the red cube", ["the blue cube", "the red cube"], None),
        ("It isn't the red cube", ["blue cube", "red cube"], None),
        ("It's the red cube, not the blue cube.", ["the blue cube", "the red cube"], 1),
        *(("The cube is not red.", ["red", "blue"], None), ("It is not dark red", REDS, None)),
        *(("It is red, not dark red", REDS, 0), ("It is dark red", REDS, 1)),
        *(("There is no cat in the video", YES_NO, None), ("I have no idea.", YES_NO, None)),
        *(("No idea", YES_NO, None), ("Yes, there is no cube", YES_NO, 0), ("There is no cat, so yes", YES_NO, 0)),
        *(("No, there is not.", YES_NO, 1), ("No there isn't", YES_NO, 1), ("The answer is no.", YES_NO, 1)),
    ],
)
def test_what_is_denied_is_not_named(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    "said",
    [
        *(
            "(A) or (B)",
            "A) or B)",
            "(A), (B)",
            "(A) and (C)",
            "A. and C.",
            "(B) or (C)",
            "B, or C",
            "It's (A) or (B).",
        ),
        *("The answer is B, C.", "Option B, C", "The answer is B or maybe C", "A. B. C."),
        "Option A and B are incorrect.",
        *("A and/or B", "(A) and/or (B)", "The answer is A and/or B", "A or/and C", "It could be (A) or B"),
        *("B as well as C", "The answer is A as well as B", "Option A as well as option B", "Option A and option B"),
        *("A plus B", "B along with C.", "I choose A together with B", "The answer is A plus option B"),
        *("A then B", "A, then B", "B and then C", "The answer is A then B", "First A then B then C"),
        *("A to C", "A through C", "Options A to C", "(A) to (C)", "The answer is A to C.", "So A then C"),
    ],
)
def test_several_letters_name_none(said: str) -> None:
    assert chosen_option(said, XYZ) is None


ROADS, MOVES = ["A to B", "B to C", "C to D", "B then A"], ["to the left", "to the right", "up then down", "not B"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("A to the left", MOVES, 0), ("The answer is B to the right", MOVES, 1), ("C up then down", MOVES, 2)),
        *(("A, to the left", MOVES, 0), ("B: to the right", MOVES, 1), ("C. up, then down", MOVES, 2)),
        *(("A to B", ROADS, 0), ("The answer is B to C", ROADS, 1), ("(C) C to D", ROADS, 2), ("B then A", ROADS, 3)),
        *(("B plus C", ["red", "A plus B", "B plus C"], 2), ("C and/or A", ["B", "C and/or A", "C"], 1)),
        *(
            ("B, then the dog runs", COLOURS, 1),
            ("B, then A man walks", COLOURS, 1),
            ("B, as well as a dog", COLOURS, 1),
        ),
        *(("The answer is B, plus A is wrong", COLOURS, 1), ("B. Then A man leaves", COLOURS, 1)),
        *(
            ("If it isn't A, then B", COLOURS, 1),
            ("Not A then. B", COLOURS, 1),
            ("A to C are wrong, so D.", COLOURS, 3),
        ),
        *(("I changed my answer from A to B.", COLOURS, 1), ("I switch A to C", COLOURS, 2)),
    ],
)
def test_words_that_join_letters_may_be_other_words(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("I change my mind from A to B", 1), ("I changed my mind from B to C", 2), ("Changing my mind: A to B", 1)),
        *(("I changed my selection from A to B", 1), ("I revise my first guess from B to C", 2)),
        *(("I'd change it from A to B", 1), ("Change that from A to B.", 1), ("No, switch this from A to C", 2)),
        *(("I would like to change it from A to C", 2), ("I have to correct my response from A to B", 1)),
        *(("I modify my answer from A to B", 1), ("I amended my choice: A to C.", 2), ("Correction: A to B", 1)),
        *(("My answer moved from B to C", 2), ("My final answer has shifted from (A) to (B)", 1)),
        *(("I changed my answer from (B) to (C).", 2), ("I change my answer from option A to option C", 2)),
        *(("I change my answer from A to B or C", None), ("I change my answer from A to B and C", None)),
        *(("I change my answer: A and C", None), ("Correction: B and C", None), ("My answer is A to C", None)),
        *(("He changes his mind from A to B", None), ("She changed it from A to B", None)),
        *(("He wants to change it from A to B", None), ("The man moved that from B to C", None)),
        *(("He moves my selection from A to B", None), ("My cat moved from B to C", None), ("I switch A and B", None)),
    ],
)
def test_of_two_letters_joined_by_a_change_of_mind_the_second_is_the_answer(said: str, option: int | None) -> None:
    assert chosen_option(said, COLOURS) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("He moves from A to B. B", 1), ("He moves from B to C. A", 0), ("He moves from A to B\nC", 2)),
        *(("It turns from A through C: D", 3), ("He moves from (A) to (B). (C).", 2)),
        *(("He moves from A to B", None), ("He moves from A to B and stops at B", None)),
        *(("He moves from A to B or C. B", None), ("He moves from A to B to C", None)),
        *(("It goes from A to C. B or D", None), ("It goes from A to C. B. D", None), ("From A to C, D", None)),
    ],
)
def test_after_a_way_between_two_letters_only_a_letter_alone_is_the_answer(said: str, option: int | None) -> None:
    assert chosen_option(said, COLOURS) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("B. blue / C. green", None),
        ("(B) blue or (C) Green", None),
        ("D. dark  red cube, A. red", None),
        ("B. blue / because it is", 1),
        ("B. blue. C. green is wrong.", 1),
        ("A. red / A. red", 0),
    ],
)
def test_several_options_with_their_letters_name_none(said: str, option: int | None) -> None:
    assert chosen_option(said, ["red", "blue", "green", "dark red cube"]) == option


VITAMINS, TEAMS = ["Vitamin B", "Vitamin C", "Vitamin D", "Vitamin A"], ["Team B", "Team A", "Team C", "Neither"]
GROUPS = ["Group B", "Group C", "Group A", "none"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("The answer is Vitamin C.", VITAMINS, 1), ("The label shows vitamin C.", VITAMINS, 1)),
        *(("The winner is Team B.", TEAMS, 0), ("The winning team is Team A", TEAMS, 1), ("B. Team A", TEAMS, 1)),
        *(("The answer is Group B.", GROUPS, 0), ("I think it is Group C", GROUPS, 1), ("A. Group B", GROUPS, 0)),
        *(("The video shows that Team B beat Team A", TEAMS, None), ("The winner is the team.", TEAMS, None)),
        *(("Team B won, so the answer is A.", TEAMS, 0), ("(C) Team C", TEAMS, 2), ("The answer is C", GROUPS, 2)),
    ],
)
def test_a_letter_within_the_words_of_an_option_is_no_letter_of_the_list(
    said: str, options: list[str], option: int | None
) -> None:
    assert chosen_option(said, options) == option


PLAIN = ["red", "blue", "green", "yellow"]
SCENES = ["The man walks into the room.", "The woman opens the door.", "The child laughs.", "The dog barks."]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("A. red.\nB. blue.", PLAIN, None), ("(A) red (B) blue", PLAIN, None), ("A\nB", PLAIN, None)),
        *(("A.\nB.\nC.", PLAIN, None), ("A. red\nB. blue\nC. gre", PLAIN, None), ("A. red\nB. blue\nC", PLAIN, None)),
        ("A. The man walks into the room.\nB. The woman opens the door.\nC. The child", SCENES, None),
        ("A) The man walks into the room. B) The woman opens the door.", SCENES, None),
        *(("A. red.\nB. blue.\nAnswer: B", PLAIN, 1), ("A. red\nB. blue\nIt is green.", PLAIN, 2)),
        *(("A. red", PLAIN, 0), ("A. red\nC. green", PLAIN, None), ("A. red B. blue C. green D. yellow B", PLAIN, 1)),
        ("A. B", ["B", "A"], 0),
    ],
)
def test_a_repetition_that_is_cut_off_is_no_answer(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("It could be A, but B is more likely.", PLAIN, 1), ("I can't tell whether A or B is right.", PLAIN, None)),
        *(("Is it C?", PLAIN, None), ("Is it C? No, it is D.", PLAIN, 3), ("C?", PLAIN, 2)),
        *(("Yes or no", YES_NO, None), ("yes no", YES_NO, None), ("yes", YES_NO, 0)),
        *(("Option 2", PLAIN, 1), ("The second option.", PLAIN, 1), ("The answer is option two", PLAIN, 1)),
        *(
            ("Option 2", ["3", "4", "5"], None),
            ("The second option shows a man", PLAIN, None),
            ("Option 7", PLAIN, None),
        ),
        *(
            ("D for sure", PLAIN, 3),
            ("Looks like D to me", PLAIN, 3),
            ("C it is", PLAIN, 2),
            ("C matches best", PLAIN, 2),
        ),
        *(("option c is correct", PLAIN, 2), ("It isn't red or blue, it's green", PLAIN, 2)),
    ],
)
def test_answers_in_other_words(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


MUSIC, DEVICES = ["Jazz", "Rock", "R&B", "Pop"], ["Sing", "A/C", "Q&A", "Rest"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *((said, PLAIN, None) for said in ("N/A", "N/A.", "Answer: N/A", "Not applicable (N/A)", "N.A.", "n/a")),
        *(("N/A", ["red", "N/A"], 1), ("It is R&B music.", PLAIN, None), ("He turned on the A/C unit", PLAIN, None)),
        *(("The genre is R&B", MUSIC, 2), ("They hold a Q&A.", DEVICES, 2), ("He turns on the A/C.", DEVICES, 1)),
        *(("He plays the C-sharp key.", ["C-sharp", "B-flat", "D", "E"], 0), ("From the U.S.A.", PLAIN, None)),
    ],
)
def test_capitals_of_compounds_are_no_letters(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("A. red: wrong. B. blue: right. The answer is B.", 1), ("B. blue, not red", 1), ("A seems correct.", 0)),
        *(("(A) red - no\n(B) blue - yes\n\nSo the answer is (B).", 1), ("A: No\nB: Yes\nC: No", 1)),
        *(("C. green is incorrect. The correct answer is B.", 1), ("A seems correct, but B is the answer.", 1)),
        *(("Although A looks right, B is the correct answer.", 1), ("B\nC", None), ("(B)\n(C)", None)),
        *(("B) blue\nC) green", None), ("I think it's B. blue / C. green", None), ("B. blue\nB", 1)),
        *(("It's the second one", 1), ("The second one.", 1), ("the 2nd option", 1), ("Option #2", 1)),
        *(("B. blue. No other colour is seen.", 1), ("B. blue. Not that it matters", 1)),
        *(("B rather than A", 1), ("B instead of A", 1), ("(B) not (A)", 1), ("B over A", 1)),
        *(("anything but B", None), ("all except B", None), ("The video does not show red; it shows blue", 1)),
    ],
)
def test_what_is_gone_through_or_preferred(said: str, option: int | None) -> None:
    assert chosen_option(said, PLAIN) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("The answer is blue, as shown in clip A.", 1),
        ("Player B, in the green shirt.", 2),
        ("In scene C, red.", 0),
        ("The D-pad is blue", 1),
        ("Step B: the cube is green.", 2),
        ("Blue (see frame D).", 1),
        ("I think B. The red cube is beside it", 1),
        ("Blue (D)", 3),  # the letter in brackets counts
        ("Image B", 1),
        ("It is shown in picture C.", 2),
        ("The letter on the cube is D, and the cube is blue.", None),  # ambiguous: the letter or the colour
    ],
)
def test_a_capital_that_names_something_else_is_no_option(said: str, option: int | None) -> None:
    assert chosen_option(said, ["red", "blue", "green", "yellow"]) == option


@pytest.mark.parametrize(
    "said",
    [
        *("I don't see a red cube", "There is no red cube.", "I see no red cube", "The cube never turns red."),
        *("It does not look red", "The cube does not appear to be red", "The cube isn't really red"),
        *("It wasn't red", "I can't see any red cube"),
        *("A) red: incorrect\nB) blue: incorrect\nC) green: correct", "A) red – incorrect\nB) blue – correct"),
    ],
)
def test_denied_in_a_sentence_is_not_named(said: str) -> None:
    assert chosen_option(said, ["red", "blue", "green", "yellow"]) != 0
    if "blue" not in said:
        assert chosen_option(f"{said}; it is blue.", ["red", "blue", "green", "yellow"]) == 1


THROUGH = "A. Blue: it is not blue.\nB. Red: it is red.\n"


@pytest.mark.parametrize(
    ("said", "option"),
    [
        (f"{THROUGH}\nTherefore, the correct answer is B.", 1),
        (f"{THROUGH}**Conclusion:** B", 1),
        ("(A) Blue: not shown. (B) Red: shown. The answer is (B).", 1),
        ("**A. Blue** - incorrect.\n**B. Red** - correct.\n\n**Answer: B**", 1),
        ("A. Blue \u274c\nB. Red \u2705\nC. Dark green \u274c", 1),
        ("A. Blue: it is not blue.\nB. Red: it", None),  # cut off before an answer
        ("A. Blue. The others, such as B. Red, are not shown.", 0),
        ("B. Red. is not shown. A. Blue. is shown. The answer is A.", 0),
    ],
)
def test_options_gone_through_from_the_first_line_are_not_the_answer(said: str, option: int | None) -> None:
    assert chosen_option(said, COLOURS) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("I first thought the answer was A, but it is C.", 2), ("The answer is A. Actually, it is C.", 2)),
        *(("The answer is A. No wait, C.", 2), ("Answer: A\nCorrection: C", 2), ("A is close but C is best.", 2)),
        ("If it were blue, the answer would be A. It is not, so C.", 2),
        ("If the answer is A, then it is blue, but it is not. So C.", 2),
        *(
            ("One might think the answer is A. However, it is C.", 2),
            ("The answer is unlikely to be A. C is better.", 2),
        ),
        ("At first I thought the answer was A, but looking again, it's C.", 2),
        *(("At first the answer was A.", 0), ("If I had to choose, the answer would be C.", 2)),
        *(("The answer is C, but A is also plausible.", 2), ("The answer is C. No other option fits.", 2)),
    ],
)
def test_what_is_supposed_or_taken_back_is_not_the_answer(said: str, option: int) -> None:
    assert chosen_option(said, COLOURS) == option


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        ("The woman's bag", ["The man's hat", "The woman's bag"], 1),
        ("The woman\u2019s bag.", ["The man's hat", "The woman's bag"], 1),
        ("The answer is A McDonald's restaurant", ["A library", "A high school", "A McDonald's restaurant"], 2),
        ("A. Socks\nB. The sign 'on'\nC. Pants\nAnswer: A", ["Socks", "The sign 'on'", "Pants"], 0),
        ('A. "Stop".\nB. "Wait".\nAnswer: A', ['"Stop".', '"Wait".'], 0),
        ("A. $5\nB. $10\nC. $15", ["$5", "$10", "$15"], None),
        ("A. Maybe.\nB. No.\nC. I don't know.\nAnswer: A", ["Maybe.", "No.", "I don't know."], 0),
    ],
)
def test_quotes_and_signs_within_options(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    "said",
    [
        *(
            "Option C accurately describes the video.",
            "Option C matches the video.",
            "Option C is shown.",
            "C ist richtig.",
        ),
        *("Option A is not supported by the video. Option C is supported.", "Only option C matches."),
        *("L'option C est correcte.", "La opci\u00f3n C es correcta.", "\u6211\u9009C\uff0c\u56e0\u4e3aA\u4e0d\u5bf9"),
        *(
            "\u7b54\u6848\u4e0d\u662fA\uff0c\u800c\u662fC",
            "Either A or C, most likely C.",
            "A, B, and D are out, leaving C.",
        ),
        *(
            "Step 1: Observe A.\nStep 2: Compare B.\nConclusion: C",
            "\u25c1think\u25b7A\u25c1/think\u25b7C",
            "[THINK]A[/THINK]C",
        ),
    ],
)
def test_further_words_that_name_an_option(said: str) -> None:
    assert chosen_option(said, COLOURS) == 2


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    "said",
    [
        *("It is {} not E", "It's {} instead of E", "It is {} rather than E", "It is {} rather than option E"),
        *("So {} rather than E", "Probably {} over E", "Option {} rather than (E)", "I think {} not E."),
        *(
            "It's {} in my opinion",
            "{} in my view.",
            "Probably option {} then",
            "I'd say {} then.",
            "It is {} for sure",
        ),
        *("{} sounds right", "Option {} sounds correct."),
    ],
)
def test_a_letter_preferred_to_another_or_said_to_be_an_opinion_is_the_answer(said: str, letter: str) -> None:
    assert chosen_option(said.format(letter), [*COLOURS, "white"]) == "ABCD".index(letter)


@pytest.mark.parametrize("said", ["It is not C then", "It is C level, not D level", "D sounds wrong", "C sounds loud"])
def test_words_of_preference_that_name_no_option(said: str) -> None:
    assert chosen_option(said, COLOURS) is None


def test_brackets_in_a_row_name_none() -> None:
    assert chosen_option("(A)(B)(C)(D)", COLOURS) is None


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("I'm not sure, but my best guess is:\nB", 1), ("The man does not open the door:\nB", 1)),
        *(("The statement that is not true is:\nB", 1), ("The false statement is: C", 2)),
        *(("Which animal is not in the video:\nB", 1), ("It is not clear, my pick: C as he sits", 2)),
        *(("If it meowed, the answer would be A.\nB", 1), ("I thought the answer was A.\n\nB", 1)),
        ("First, I considered whether the answer is A. But no cat is seen.\n\nB", 1),
        *(("The options that are not shown:\nB\nC\nD", None), ("Eliminated:\nB", None)),
    ],
)
def test_a_sentence_with_a_denial_or_a_supposition_hides_no_letter_behind_it(said: str, option: int | None) -> None:
    assert chosen_option(said, NOUNS) == option


HUES = ["Red", "Blue", "Green", "Yellow"]


@pytest.mark.parametrize(
    "no", [" - No.", " – No.", ": No", " - No", ": no", " -> No", " (No)", " is wrong", "\n   No."]
)
@pytest.mark.parametrize(
    "end",
    [
        *("\n\nThe correct answer is B.", "\n\nSo the answer is **B**.", "\n\nAnswer: B", "\n\nOption B", "\n\nB"),
        *("\nHence B.", "\n\nThe answer is:\nB. Blue", "\n\n**B. Blue**"),
    ],
)
@pytest.mark.parametrize("bullet", ["", "Let me see:\n"])
def test_a_verdict_of_no_on_one_option_takes_nothing_back(no: str, end: str, bullet: str) -> None:
    """Nor does it deny the content of the next line."""
    yes = " is right" if "wrong" in no else no.replace("No", "Yes").replace("no", "yes")
    said = [f"{letter}. {hue}{yes if letter == 'B' else no}" for letter, hue in zip("ABCD", HUES, strict=True)]
    for lines in (said, [f"- **{line}**" for line in said]):
        assert chosen_option(bullet + "\n".join(lines) + end, HUES) == 1


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("A. Red - No. B. Blue - Yes. C. Green - No. D. Yellow - No. The correct answer is B.", 1),
        ("Look:\nA: No.\nB: Yes.\nC: No.\nD: No.\nThe answer is B.", 1),
        ("Is the ball green? No\n\nAnswer: B", 1),
        ("A. Red - No.\nB. Blue - No.\nThe answer is\nC. Green", 2),
        ("A. Red: yes, the answer is A.\nB. Blue: no.\nC. Green: no.\nD. Yellow: no.", 0),
        ("The answer is A. No, B.", 1),
        ("The answer is A.\nNo.\nB", 1),
        ("The answer is A. No, B. Blue", 1),
        ("The answer is A. No wait:\nB.", 1),
    ],
)
def test_what_follows_a_list_of_verdicts_is_the_answer(said: str, option: int) -> None:
    assert chosen_option(said, HUES) == option


DEEDS = ["A man runs.", "A dog sleeps.", "A cat eats.", "Nobody is there."]


@pytest.mark.parametrize("options", [HUES, DEEDS])
@pytest.mark.parametrize("between", [" - ", ": ", " \u2013 ", " \u2014 ", " -> ", ", ", " (", ". ", " is ", "\n   "])
@pytest.mark.parametrize("said", ["Yes/No", "Yes./No.", "Correct/Incorrect", "correct./wrong.", "true/false"])
@pytest.mark.parametrize("end", ["\n", "\n\n", " "])
@pytest.mark.quick_sets(100)
def test_the_only_option_that_is_said_to_be_right_is_the_answer(
    options: list[str], between: str, said: str, end: str
) -> None:
    """This also holds for options that end in a full stop."""
    yes, no = said.split("/")
    for label in ("{}. ", "{}) ", "({}) ", "{}: "):
        for right in range(4):
            lines = [
                f"{label.format('ABCD'[n])}{option}{between}{yes if n == right else no}{')' if '(' in between else ''}"
                for n, option in enumerate(options)
            ]
            assert chosen_option(end.join(lines), options) == right


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        ("A. A man runs. - No.\nB. A dog sleeps. - No.", DEEDS, None),
        ("A. A man runs. - Yes.\nB. A dog sleeps. - Yes.", DEEDS, None),
        ("A. A man runs. - No. B. A dog sleeps. - No.", DEEDS, None),
        ("A. Red - No. B. Blue - No. C. Green - No.", HUES, None),
        ("A. Red. No. B. Blue.", HUES, 1),
        ("C. A cat eats. - No. The answer is B.", DEEDS, 1),
        ("A. A man runs. - Yes.\nB. A dog sleeps. - No.\nThe answer is B.", DEEDS, 1),
        ("A. Red - yes, but not here.\nB. Blue - no.", HUES, None),
        ("A. Red\nB. Blue\nC. Green\nD. Yellow\n\nCorrect: B", HUES, 1),
        ("A. A man runs.\nB. A dog sleeps.\nRight.", DEEDS, None),
        ("A. Red - it is not.\nB. Blue - correct, as is shown.\nC. Green - it is not.", HUES, 1),
        ("A. Turn right B. Turn left", ["Turn right", "Turn left"], None),
        ("A. Yes.\nB. No.", ["Yes.", "No."], None),
        ("A. Yes. - No.\nB. No. - Yes.", ["Yes.", "No."], 1),
        ("B. A dog sleeps. No cat is seen.", DEEDS, 1),
    ],
)
def test_verdicts_that_name_no_option_and_words_that_are_none(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    "options",
    [
        ["b, e, a", "e, a, b", "a, b, e"],
        ["(b)(a)(c).", "(a)(b)(c).", "(c)(b)(a)."],
        ["b a", "a b", "b c"],
        ["us", "US", "Us citizens"],
        ["<div>", "<span>", "<p>", "<b>"],
    ],
)
@pytest.mark.parametrize("form", ["{0}. {1}", "({0}) {1}", "**{0}. {1}**", "{0}: {1}", "{0} - {1}", "{1}", "{1}."])
def test_letters_case_and_tags_of_options_are_compared_as_they_are(options: list[str], form: str) -> None:
    for number, option in enumerate(options):
        if "<" in option and "**" in form:  # such tags are read as markup of the model
            continue
        assert chosen_option(form.format("ABCD"[number], option), options) == number


@pytest.mark.parametrize("options", [["b, e, a", "e, a, b", "a, b, e"], ["B, C, A", "A, C, B", "C, B, A"]])
@pytest.mark.parametrize("form", ["The answer is {}", "The correct order is as follows. Answer: {}.", "I choose {}"])
def test_an_announced_option_of_several_letters_is_not_its_first_letter(options: list[str], form: str) -> None:
    assert [chosen_option(form.format(option), options) for option in options] == [0, 1, 2]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        ("The right answer is left.", ["left", "right"], 0),
        ("The right option: Left", ["Left", "Right"], 0),
        ("The right answer is right.", ["left", "right"], 1),
        ("It is the right one.", ["left", "right"], 1),
        ("The correct answer is incorrect.", ["Correct", "Incorrect"], 1),
        ("The true answer is false", ["True", "False"], 1),
    ],
)
def test_the_word_that_calls_an_answer_right_is_no_option(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


def test_the_conclusion_behind_tagged_reasoning_is_the_answer() -> None:
    """The form is that of LLaVA-CoT."""
    said = "<SUMMARY>A cube.</SUMMARY>\n<REASONING>A is dark. C?</REASONING>\n<CONCLUSION> B </CONCLUSION>"
    assert chosen_option(said, COLOURS) == 1


@pytest.mark.parametrize(
    "said",
    [
        "Answer: B\n\nQuestion: What shape?\nA. cube\nB. ball\nAnswer: A",
        "The answer is B.\nQ2: And now?\nThe answer is C.",
        "B. red\nUSER: And now?\nASSISTANT: Answer: C",
        "Question: Which colour?\nAnswer: A\nWait, the answer is B.",  # there is no answer before the question
    ],
)
def test_a_further_question_that_a_model_asks_itself_is_no_part_of_its_answer(said: str) -> None:
    assert chosen_option(said, COLOURS) == 1


SHADES = ["dark green", "red", "blue", "green"]


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("There is a red cube.\nQuestion: Which colour?\nAnswer: C. blue", 2),
        ("A human in red.\nHuman 1: red shirt\nHuman 2: blue shirt\nThe answer is C.", 2),
        ("The cube is red.\nUser: the ball is blue.\nThe answer is D.", 3),
        ("A. dark green\nB. red\nC. blue\nD. green\nQuestion: Which?\nAnswer: C", 2),
    ],
)
def test_what_only_describes_before_a_further_question_is_no_answer(said: str, option: int) -> None:
    assert chosen_option(said, SHADES) == option


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        ("The car turns right\nAnswer:", ["left", "right"], 1),
        ("It is true\nAnswer: yes it is", ["True", "False"], 0),
        ("It turns right - answer: right", ["left", "right"], 1),
        ("So my final right answer is left.", ["left", "right"], 0),
        ("Well,\n- Right answer: it goes left", ["left", "right"], 0),
    ],
)
def test_an_option_at_a_lines_end_is_not_taken_for_a_part_of_the_announcement(
    said: str, options: list[str], option: int
) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    "said",
    [
        "<answer>C</answer>\n<conclusion>Done.</conclusion>",
        "<ANSWER>blue</ANSWER> <CONCLUSION>It does not look red.</CONCLUSION>",
        "<CONCLUSION></CONCLUSION> C",
        "<conclusion>Red at first.</conclusion><answer>C</answer><answer> </answer>",
    ],
)
def test_a_tagged_answer_counts_before_a_conclusion_and_none_that_is_empty(said: str) -> None:
    assert chosen_option(said, SHADES) == 2


class Counted:
    """A pattern that counts the characters of the texts it searches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern, self.characters = pattern, 0

    def search(self, text: str) -> re.Match[str] | None:
        self.characters += len(text)
        return self.pattern.search(text)


@pytest.mark.parametrize(
    "said", ["The answer is A? ", "red ", "Not A, ", "dark green or red ", "option A matches ", "no, A ", "- A x "]
)
def test_the_work_on_a_model_that_repeats_itself_grows_with_its_text(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not grow with the square: reasoning models may generate 32 thousand tokens."""
    looked: list[int] = []
    for length in (4000, 8000):
        denial, normal = Counted(chosen_options.NOT), Counted(re.compile(""))
        with monkeypatch.context() as patch:
            patch.setattr(chosen_options, "normal_text", lambda text, normal=normal: normal.search(text) and text)
            for module in (chosen_options, joined_letters, named_options):
                patch.setattr(module, "NOT", denial)
            chosen_option(said * (length // len(said)), SHADES)
        looked.append(denial.characters + normal.characters)
    assert looked[1] < 3 * looked[0]


CLOSES = ["The man opens the door.", "The man closes the door.", "The man sits down.", "The man leaves."]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        ("A. red. This is incorrect.\nB. blue. This is correct.\nC. green. This is incorrect.", PLAIN, 1),
        ("A. red. This option is not correct.\nB. blue. This is the correct option.", PLAIN, 1),
        ("A. red: This is incorrect.\nB. blue: This is correct.", PLAIN, 1),
        ("A) Red - This is incorrect because it is not seen.\nB) Blue - This is correct.", PLAIN, 1),
        ("A. red: A blue cube is seen, so this is false.\nB. blue: It is, so this is true.\nC. gr", PLAIN, 1),
        ("A - False, B - True, C - False, D - False", PLAIN, 1),
        ("A: red. The cube is not red.\nB: blue. The cube is blue.", PLAIN, 1),
        (
            "A. red. The cube isn't red.\nB. blue. The cube is blue, not red.\nC. green. There is no green cube.",
            PLAIN,
            1,
        ),
        ("Option A: It is not red.\nOption B: It is blue, as seen.\nOption C: It is not green.", PLAIN, 1),
        (
            "A. red. Not visible.\nB. blue. Visible throughout.\nC. green. Not visible.\nD. yellow. Not visible.",
            PLAIN,
            1,
        ),
        ("A. red: no.\nB. blue: a cube lies there.\nC. green: no.\nD. yellow: no.", PLAIN, 1),  # all others are denied
        ("A. red. B. blue is wrong.", PLAIN, 0),
        ("A. red, because it is seen. B. blue is wrong.", PLAIN, 0),
        ("A. red: present at the front right.\nB. blue: not.", PLAIN, 0),  # "nt" alone is no negation
        ("A. red. It is not ruled out: it is seen.\nB. blue. Not seen.", PLAIN, 0),
        ("A. red. It is seen at the end. B. blue. It is never shown.", PLAIN, 0),
        ("A. The red cube\nB. The blue cube\nC. The green cube\n\nThe answer is C.", PLAIN, 2),
        ("A. The man opens the door. This is incorrect.\nB. The man closes the door. This is correct.", CLOSES, 1),
        ("A. left: The cup is right of it.\nB. right: This is right.", ["left", "right"], 1),
    ],
)
def test_the_verdict_on_options_gone_through_may_be_a_sentence(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    "said",
    [
        "A: 10%\nB: 70%\nC: 10%\nD: 10%",
        "A) 10% B) 70% C) 10% D) 10%",
        "A. red. Not seen.\nB. blue. Not seen.\nC. green. Not seen.\nD. yellow. Not seen.",
        "A. red. A man walks.\nB. blue. A dog runs.",
        "A. red. The cube is not red.\nB. blue. The",  # cut off: the verdict on B is missing
        "A. The red cube\nB. The blue cube\nC. The green cube",
        "A. red. It is correct.\nB. blue. It is correct.",
        "A. red: correct, but not at the end.\nB. blue: not.",
    ],
)
def test_of_options_gone_through_none_is_named_where_nothing_decides(said: str) -> None:
    """The letter of the first option is not returned either."""
    assert chosen_option(said, PLAIN) is None


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("D. yellow. This is wrong.", PLAIN, None), ("D. yellow is wrong", PLAIN, None)),
        ("B. The man closes the door. This is incorrect. The answer is C.", CLOSES, 2),
        ("C. green. That option is not right, it is blue.", PLAIN, 1),
        ("B. The man closes the door. It is not clear who opens it.", CLOSES, 1),
        ("B. The man closes the door. This is not the first time.", CLOSES, 1),
    ],
)
def test_an_option_that_a_further_sentence_denies_is_not_named(
    said: str, options: list[str], option: int | None
) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *((f"A: {said}", PLAIN, 2) for said in ("C", "c", "(C)", "C. green", "Option C", "green", "It is green.")),
        *(
            ("A: C\nQ: And now?\nA: B", PLAIN, 2),
            ("Q: What colour?\nA: C", PLAIN, 2),
            ("Q2: What?\nA: Green.", PLAIN, 2),
        ),
        ("Q: Which?\nA. red\nB. blue\nC. green\nD. yellow\nA: C", PLAIN, 2),
        *(("A: red", PLAIN, 0), ("A: It is red.", PLAIN, 0), ("A: because it turns green", PLAIN, 0)),
        *(("A: Red. It is not green.", PLAIN, 0), ("B: It is green.", PLAIN, 1), ("A: B", ["B", "A"], 0)),
        *(("A: B or C", PLAIN, None), ("A: B, C", PLAIN, None)),
    ],
)
def test_a_before_another_option_alone_means_answer(said: str, options: list[str], option: int | None) -> None:
    """Models that were not trained on dialogues answer in this form."""
    assert chosen_option(said, options) == option


REFUSALS = [
    *("I cannot answer this question.", "Sorry, I can't see the video.", "I don't know", "I do not know.", "Unknown"),
    *("Unable to determine", "None of the above", "The video does not show this", "I'm sorry, but I cannot answer."),
    *("I can\u2019t tell.", "Cannot be determined.", "It cannot be determined from the video", "N/A", "No idea"),
    *("Not enough information.", "There isn't enough information to tell.", "I'm not sure.", "It's unclear", "None"),
    *("As an AI language model, I cannot watch videos.", "Unfortunately, I am unable to view the video."),
    "I don't know what the man is doing.",
]
OPENS = ["The man cannot open the door.", "The man opens the door.", "The man sits.", "The man leaves."]


@pytest.mark.parametrize("mark", ["A: ", "A. ", "A - ", "A) ", "a: ", "**A:** ", "A:\n"])
@pytest.mark.parametrize("said", REFUSALS)
def test_a_before_a_refusal_means_answer(said: str, mark: str) -> None:
    for options in (PLAIN, ["Yes", "No"]):
        assert chosen_option(mark + said, options) is None
    assert chosen_option(mark + said, OPENS[1:]) is None
    assert chosen_option(mark + said, OPENS) == 0  # this may explain that the man cannot open the door


@pytest.mark.parametrize("mark", ["A: ", "A. ", "A - "])
def test_an_option_that_is_a_refusal_keeps_its_letter(mark: str) -> None:
    for said in REFUSALS:
        assert chosen_option(mark + said, [said, "red", "blue"]) == 0
        assert chosen_option(mark + said, ["Unknown", "red", "blue"]) == 0
    assert chosen_option("A: None of the above", ["red", "blue", "None of the above"]) == 2
    assert chosen_option("A: I don't know", ["red", "blue", "I don't know"]) == 2


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("A: the man cannot open the door", OPENS, 0), ("A: The man can't open the door, it is locked", OPENS, 0)),
        *(("A: Unable to open the door", OPENS, 0), ("A. The door cannot be opened", OPENS, 0)),
        *(("A: The video does not show this.", ["No", "Yes"], 0), ("A: I don't know", ["No", "Yes"], None)),
        *(("A: None of these", ["Nothing", "A dog"], 0), ("A: None", ["0", "1"], 0), ("A: none", ["No dog", "One"], 0)),
        *(("A: I'm not sure about the shape, but the cube is red", ["red cube", "blue"], 0),),
        *(("A. I cannot tell which man. He walks to the front.", ["A man walks", "A dog runs"], 0),),
        *(("A: I cannot see a blue, green or yellow cube.", PLAIN, 0), ("A: None of the other options fit", PLAIN, 0)),
        *(
            ("A: Unknown people walk", PLAIN, 0),
            ("A: None of the people walk", PLAIN, 0),
            ("A. I don't know why", PLAIN, 0),
        ),
        *(
            ("A, I don't know", PLAIN, 0),
            ("A. Sorry for the delay.", PLAIN, 0),
            ("A: The video does not end", PLAIN, 0),
        ),
        *(
            ("A: I'm not sure, but I think C", PLAIN, 2),
            ("A: Sorry, I meant B", PLAIN, 1),
            ("B. I'm not sure.", PLAIN, 1),
        ),
        *(("A: I don't know. It may be green.", PLAIN, 2), ("Answer: A. I'm not sure.", PLAIN, 0)),
    ],
)
def test_a_before_words_that_resemble_a_refusal(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    "said",
    [
        *(
            "I'm not sure, but this is my best guess.",
            "It's not clear, but this is the most likely.",
            "Unclear, I think so",
        ),
        *("It is unclear, but most likely.", "I don't know for certain, but this is the most likely option."),
        *("I am not sure, but it seems right", "I'm not sure but this one looks correct to me", "Unknown; probably."),
        *(
            "I don't know, but I think so.",
            "I'm not sure. I would go with this option.",
            "It's unclear. My best guess.",
        ),
        *("Sorry, I can't see the video, but this would be the most plausible answer given the question.",),
        *(
            "I'm not sure, but it is most likely the right answer of these.",
            "I don't know. I guess that is the closest.",
        ),
    ],
)
def test_words_after_a_refusal_may_call_the_option_before_them_the_answer(said: str) -> None:
    for first in ("One person", "They are identical"):
        options = [first, "Two persons", "Three persons", "Four persons"]
        for number, letter in enumerate("ABC"):
            for mark in (". ", ": ", ") "):
                assert chosen_option(letter + mark + said, options) == number


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("I'm not sure, but this is my best guess: C", 2), ("I'm not sure, but my best guess is C.", 2)),
        *(("I'm not sure. Probably c", 2), ("I don't know, but most likely two persons", 1)),
        *(("I'm not sure, but this is my best guess. Three persons", 2), ("It is unclear, but most likely: (D)", 3)),
        *(
            (said, None)
            for said in ("I'm not sure, but this is my best guess. I don't know.", "Unclear. Is this the best?")
        ),
        *((said, None) for said in ("I'm not sure, but this is not the best answer", "I don't know, I don't think so")),
        *((said, None) for said in ("Unclear, but it is right behind the car", "Unclear. It is likely on the table.")),
        *(
            (said, None)
            for said in (
                "I cannot tell. This is the best I can do.",
                "I don't know, this is difficult",
                "Unclear, right?",
            )
        ),
        *((said, None) for said in ("I'm not sure, but it is right. Maybe B or C.", "I'm not sure, I think... no")),
    ],
)
def test_words_after_a_refusal_that_do_not_call_the_option_before_them_the_answer(
    said: str, option: int | None
) -> None:
    options = ["One person", "Two persons", "Three persons", "Four persons"]
    assert chosen_option(f"A: {said}", options) == option


ALIKE = ["They are identical", "The left one is larger", "The right one is larger", "They overlap"]


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *((f"{unable} tell them apart.", 0) for unable in ("I cannot", "It is impossible to", "There is no way to")),
        *((f"{unable} tell the difference", 0) for unable in ("I can't", "It's not possible to", "There's no way to")),
        *((f"{unable} identify a difference", 0) for unable in ("I am unable to", "It is not possible to")),
        *(("There is no way of telling them apart", 0), ("It is impossible to tell the two apart", 0)),
        *(("They cannot be told apart", 0), ("It can't be told apart", 0), ("I have no idea why they differ", 0)),
        *(("No clue why.", 0), ("I have no idea if that is right", 0), ("There is no way to know why", 0)),
        *((f"{unable} tell", None) for unable in ("I cannot", "It is impossible to", "There is no way to")),
        *((f"{unable} tell which is larger", None) for unable in ("I cannot", "It is impossible to")),
        *(
            (f"{unable} determine an answer.", None)
            for unable in ("I cannot", "It is impossible to", "There's no way to")
        ),
        *((f"{unable} identify any of the options", None) for unable in ("I cannot", "It is not possible to")),
        *((f"{unable} say any more", None) for unable in ("I cannot", "It is impossible to", "There is no way to")),
        *(("There is no way of knowing", None), ("It is impossible to tell how far they are apart", None)),
        *(("It is impossible to determine a number", None), ("There is no way to tell a person from a bag", None)),
        *(("It is not possible to tell any real change", 0), ("I cannot tell any change", 0)),
        *(("It cannot be told", None), ("I have no idea", None), ("No idea how they differ", None)),
    ],
)
def test_words_that_find_things_the_same_are_no_refusal(said: str, option: int | None) -> None:
    for mark in ("A. ", "A: "):
        assert chosen_option(mark + said, ALIKE) == option
    assert chosen_option(f"B. {said}", ALIKE) == 1


NOT_KNOWN = [
    *("Unknown", "Not mentioned", "Cannot be determined", "It is not revealed", "Not disclosed", "Data not available"),
    *("The name isn't given", "It isn\u2019t mentioned", "It doesn't say", "He isnt seen", "There is no mention of it"),
    *("No information", "Nothing is said", "He never says it", "None of the others", "Undisclosed", "Hard to say"),
    *(
        "Impossible to tell",
        "Insufficient data",
        "Inconclusive",
        "It lacks details",
        "N/A",
        "Maybe",
        "He is confused",
        "Neutral",
    ),
]
DENIALS = [
    *("No", "False", "No, it does not", "It does not say the price", "Incorrect", "No.", "Wrong", "0", "Never"),
    *("The statement is false", "Refuted", "Contradicted"),
]


@pytest.mark.parametrize("first", [*NOT_KNOWN, *DENIALS])
def test_a_before_an_explanation_of_an_option_that_denies_is_its_letter(first: str) -> None:
    """Some of these words begin like a refusal, but they say of option A why it is right."""
    for said in (
        *("A. The video does not provide any information about the price.", "A. The video doesn't show any details."),
        *("A. There is not enough information in the video.", "A) We cannot determine the city.", "A: N/A"),
        *("A. I don't know the city, since it is not named.", "A: It cannot be determined from the video."),
    ):
        assert chosen_option(said, [first, "Paris", "London"]) == 0


@pytest.mark.parametrize("first", ["No", "False", "no.", "Incorrect", "0"])
def test_a_before_a_plain_refusal_explains_no_denial(first: str) -> None:
    for said in ("I don't know.", "I'm sorry, but I cannot answer.", "Sorry, I can't see the video.", "I'm not sure"):
        assert chosen_option(f"A: {said}", [first, "Paris"]) is None
    for lacking in ("Not revealed", "It is not known if it is wrong", "He says no"):
        assert chosen_option("A: I don't know", [lacking, "Paris"]) == 0


@pytest.mark.parametrize("first", ["A man unlocks the door", "under the table", "his uncle", "until noon", "uniform"])
def test_options_that_only_resemble_a_denial_explain_no_refusal(first: str) -> None:
    assert chosen_option("A: I don't know", [first, "Paris"]) is None


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(("A: I'm not sure about B", None), ("A: I can't tell whether it is B.", None)),
        *(("A. The answer is not given by B", None), ("A: I don't know about (C)", None)),
        *(("A: I'm not sure about the small bird", None), ("A: I'm not sure about B or C, maybe D", 3)),
        *(("A: I'm not sure about B, but I think C", 2), ("A: I'm not sure about B. It is a fish.", 3)),
        *(("A: Unfortunately, I don't know about B", None), ("A: Sorry, I meant B", 1)),
    ],
)
def test_a_letter_within_a_refusal_is_not_the_answer(said: str, option: int | None) -> None:
    assert chosen_option(said, ["a red dog", "a black cat", "a small bird", "a fish"]) == option


TURNS = ["Up", "Down", "Left", "Right"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("It's between B and C. I lean toward C.", PLAIN, 2), ("Between B and C I'm leaning towards B.", PLAIN, 1)),
        *(("It's either B or C, but I'd go for C.", PLAIN, 2), ("its c", PLAIN, 2), ("Its B.", PLAIN, 1)),
        *(("All right: B", TURNS, 1), ("That's right, it moves up.", TURNS, 0), ("You're right, left.", TURNS, 2)),
        *(("Right.", TURNS, 3), ("That is right.", TURNS, 3), ("It goes right, all right.", TURNS, 3)),
        *(("its a dog", PLAIN, None), ("I lean on a wall", PLAIN, None)),
    ],
)
def test_further_announcements_and_words_that_agree(said: str, options: list[str], option: int | None) -> None:
    assert chosen_option(said, options) == option


NOUNS = ["dog", "cat", "bird", "horse"]
ACTIONS = ["The man opens the door", "The man closes the door", "The man paints the door", "The man leaves"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("A dog is seen at first, but the cat jumps.\n\nAnswer: B", NOUNS, 1), ("A dog runs. Answer: B", NOUNS, 1)),
        *(("A bird flies by. **Answer: C**", NOUNS, 2), ("A dog moves, so the answer is B.", NOUNS, 1)),
        *(("A (dog) is wrong. The answer is B.", NOUNS, 1), ("B cat is wrong; the answer is C", NOUNS, 2)),
        *(("A dog: no. B cat: yes.", NOUNS, 1), ("C (bird) is not shown. D (horse) is.", NOUNS, 3)),
        *(("A (dog) does not fit. B (cat) is shown.", NOUNS, None), ("C (bird) is not shown.", NOUNS, None)),
        *(("A dog", NOUNS, 0), ("A (dog), since it barks", NOUNS, 0), ("B cat, as it jumps", NOUNS, 1)),
    ],
)
def test_a_sentence_that_begins_with_an_option_is_not_its_letter(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("The man opens the door, walks in, and closes it.\n\nB", ACTIONS, 1), ("The dog runs.\nB", NOUNS, 1)),
        *(("The man opens the door, and then he closes the door.\n\n**B**", ACTIONS, 1),),
        *(("The man opens the door.\nThen he turns around.\n(D)", ACTIONS, 3), ("A dog runs.\n\nB.", NOUNS, 1)),
    ],
)
def test_a_letter_alone_on_the_last_line_is_the_answer(said: str, options: list[str], option: int) -> None:
    assert chosen_option(said, options) == option


HUES = ["blue", "red", "dark green", "yellow"]


@pytest.mark.parametrize(
    ("said", "options", "option"),
    [
        *(("The answer is B.\n\nA", NOUNS, 1), ("B is the correct answer.\nA", NOUNS, 1)),
        *(("So the answer is C.\nC", NOUNS, 2), ("I think A.\n\nB", NOUNS, 0)),
        *(
            ("The correct answer is A.\n\nIncorrect options:\nB\nC\nD", NOUNS, 0),
            ("The wrong ones:\nB\nC\nD", NOUNS, None),
        ),
        ("Incorrect options:\nB", NOUNS, None),
        *(("At first I would say the answer is A.\n\nB", NOUNS, 1), ("It jumps.\n\nB\nB", NOUNS, 1)),
    ],
)
def test_a_letter_on_the_last_line_is_not_the_answer_after_an_announced_one_or_in_a_list_of_wrong_ones(
    said: str, options: list[str], option: int | None
) -> None:
    assert chosen_option(said, options) == option


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *(
            ("B red, not C dark green", 1),
            ("B red (not A)", 1),
            ("B. red, not A. blue", 1),
            ("B. red - not option C", 1),
        ),
        *(("B red, not the blue one", 1), ("B (red) is not right", None), ("B red: not shown", None)),
    ],
)
def test_another_option_that_is_denied_behind_an_option_leaves_it_the_answer(said: str, option: int | None) -> None:
    assert chosen_option(said, HUES) == option
