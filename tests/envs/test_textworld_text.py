"""TextWorld's texts: what the compiled games print, and what descriptions say in a situation."""

import pytest

from agentropy.envs.textworld.commands import understand
from agentropy.envs.textworld.story import UnsupportedGameError
from agentropy.envs.textworld.text import clean, inform_text, listing, parse

BANNER = """

                    ________  ________  __    __  ________        
                   |        \\|        \\|  \\  |  \\|        \\       
                    \\$$$$$$$$| $$$$$$$$| $$  | $$ \\$$$$$$$$       
              __       __   ______   _______   __        _______  
             |  \\  _  |  \\ /      \\ |       \\ |  \\      |       \\ 
              \\$$      \\$$  \\$$$$$$  \\$$   \\$$ \\$$$$$$$$ \\$$$$$$$ 

"""  # noqa: W291
# First lines and last of what TextWorld 1.7.0 prints.


def test_clean_leaves_what_the_game_says():
    printed = BANNER + "Win!\n\n-= Attic =-\nYou are in an attic.\n\n\n\nThere is a key.\n\n>          -= Attic =-0/1"
    assert clean(printed) == "Win!\n\n-= Attic =-\nYou are in an attic.\n\nThere is a key."


def test_clean_leaves_the_end_without_the_question():
    printed = (
        "You eat it.\n\n\n\n        *** The End ***\n\nYou scored 1 out of a possible 1, in 4 turns.\n\n\n"
        "Would you like to RESTART, RESTORE a saved game, QUIT or UNDO the last command?"
    )
    assert clean(printed) == "You eat it.\n\n*** The End ***\n\nYou scored 1 out of a possible 1, in 4 turns."


def test_clean_drops_the_parsers_note_of_what_it_took_a_word_to_mean():
    assert clean("\n(the latchkey)\nYou unlock the chest.\n\n") == "You unlock the chest."
    assert clean("(the end) is near.") == "(the end) is near."


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        ("called 'looking.'", 'called "looking."'),
        ("don't you, it's Henderson's", "don't you, it's Henderson's"),
        ("'Cooking: A Modern Approach (3rd Ed.)'", '"Cooking: A Modern Approach (3rd Ed.)"'),
    ],
)
def test_single_quotation_marks_become_double_unless_they_are_apostrophes(source, printed):
    assert inform_text(source) == printed


def test_rooms_join_lines_and_things_keep_them():
    assert parse("One.\n\n Two\nthree.", room=True) == (("text", "One.\n\nTwo three."),)
    assert parse("Mix:\n  salt", room=False) == (("text", "Mix:\n  salt"),)


def test_conditions_become_cases():
    nodes = parse("It is [if c_0 is locked]shut[else if c_0 is open]open[otherwise]closed[end if].", room=True)
    assert nodes == (
        ("text", "It is "),
        (
            "if",
            (
                ((("locked", "c_0"),), (("text", "shut"),)),
                ((("open", "c_0"),), (("text", "open"),)),
                ((), (("text", "closed"),)),
            ),
        ),
        ("text", "."),
    )


def test_lists_name_their_holder():
    assert parse("[a list of things on the s_0]", room=True) == (("list", False, "a", "s_0"),)
    assert parse("[is-are a list of things in the c_1]", room=True) == (("list", True, "a", "c_1"),)


@pytest.mark.parametrize("source", ["[if unvisited]new[end if]", "[one of]a[or]b[at random]", "a[end if]"])
def test_other_substitutions_are_refused(source):
    with pytest.raises(UnsupportedGameError):
        parse(source, room=True)


@pytest.mark.parametrize(
    ("names", "sentence"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_listing(names, sentence):
    assert (listing(names) if names else "") == sentence


COMMANDS = [
    *("look", "inventory", "go north", "examine BBQ", "take apple from table", "take red key", "take pin from box"),
    *("take pin from jar", "put apple on table", "insert apple into box", "open box", "close box"),
]


@pytest.mark.parametrize(
    ("text", "command"),
    [
        *((command, command) for command in COMMANDS),
        ("  Look. ", "look"),
        ("L", "look"),
        ("i", "inventory"),
        ("n", "go north"),
        ("north", "go north"),
        ("walk north", "go north"),
        ("x bbq", "examine BBQ"),
        ("look at the BBQ", "examine BBQ"),
        ("get the apple from the table", "take apple from table"),
        ("get apple", "take apple from table"),
        ("pick up the red key", "take red key"),
        ("pick up apple", None),
        ("take the red key!", "take red key"),
        ("put apple in box", "insert apple into box"),
        ("insert the apple in the box", "insert apple into box"),
        ("put apple onto table", "put apple on table"),
        ("shut the box", "close box"),
        ("take pin", None),  # from where?
        ("take", None),
        ("", None),
        ("s", None),
        ("examine bb", None),
        ("look" + " " * 400, None),
        ("\ud800\x00", None),
    ],
)
def test_what_players_write_is_understood(text, command):
    assert understand(text, COMMANDS) == command
