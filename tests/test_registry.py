"""Gymnasium knows the environments as soon as it is imported, and Python's start pays nothing for it."""

import os
import subprocess
import sys

import pytest

from agentropy.registry import ENV_IDS

# Python's start installed the hook already; these begin without it, so that they install it themselves.
UNHOOKED = (
    "import os, sys\n"
    "del os.environ['AGENTROPY_NO_PLUGIN']\n"
    "from agentropy.registry import ENV_IDS, _Hook, install_hook\n"
    "def waiting(): return sum(isinstance(finder, _Hook) for finder in sys.meta_path)\n"
)


def run(code: str, **environment: str) -> str:
    """Return what ``code`` prints in a fresh interpreter, away from the repository."""
    inherited = {name: value for name, value in os.environ.items() if name != "AGENTROPY_NO_PLUGIN"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=inherited | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REGISTERED = "import gymnasium; print(*sorted(name for name in gymnasium.registry if name.startswith('agentropy/')))"


def test_importing_gymnasium_registers_every_environment():
    assert run(REGISTERED).split() == sorted(ENV_IDS)


@pytest.mark.parametrize(("value", "registered"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_a_variable_switches_the_hook_off(value, registered):
    assert (run(REGISTERED, AGENTROPY_NO_PLUGIN=value) != "") == registered


def test_importing_the_environments_registers_them_without_the_hook():
    assert run(f"import agentropy.envs; {REGISTERED}", AGENTROPY_NO_PLUGIN="1").split() == sorted(ENV_IDS)


def test_the_start_of_python_imports_the_registry_alone():
    code = "import sys; print(*(name for name in sys.modules if name.split('.')[0] in ('agentropy', 'gymnasium')))"
    assert set(run(code).split()) == {"agentropy", "agentropy.registry"}


def test_registration_loads_no_world():
    code = f"{REGISTERED}; import sys; print('agentropy.envs' in sys.modules, 'textworld' in sys.modules)"
    assert run(code).splitlines()[-1] == "False False"


def test_the_hook_waits_once_and_leaves_after_the_import():
    code = "install_hook(); install_hook(); print(waiting()); import gymnasium; print(waiting())"
    assert run(UNHOOKED + code, AGENTROPY_NO_PLUGIN="1").split() == ["1", "0"]


def test_where_gymnasium_is_imported_already_registration_is_immediate():
    code = "import gymnasium; install_hook(); print(waiting(), all(name in gymnasium.registry for name in ENV_IDS))"
    assert run(UNHOOKED + code, AGENTROPY_NO_PLUGIN="1") == "0 True"


def test_an_id_that_is_taken_stays_as_it_is():
    code = (
        "import gymnasium\n"
        "for name in ENV_IDS: gymnasium.register(name, entry_point='mine:Mine')\n"
        "install_hook()\n"
        "print(*{gymnasium.spec(name).entry_point for name in ENV_IDS})\n"
    )
    assert run(UNHOOKED + code, AGENTROPY_NO_PLUGIN="1") == "mine:Mine"


def test_a_failing_import_of_gymnasium_fails_as_without_the_hook():
    code = (
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'gymnasium.envs.registration': raise ImportError('broken installation')\n"
        "install_hook()\n"
        "sys.meta_path.insert(1, Broken())\n"
        "try: import gymnasium\n"
        "except ImportError as error: print(error)\n"
    )
    assert run(UNHOOKED + code, AGENTROPY_NO_PLUGIN="1") == "broken installation"
