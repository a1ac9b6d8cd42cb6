"""Shared by the tests of the environments: a private cache folder, so that no test reads what another run left."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory):
    """Point the package's cache at a temporary folder for the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTROPY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
