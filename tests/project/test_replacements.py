"""What tests of a device that CI lacks replace in the project must exist, or they fail where they are run at last."""

from __future__ import annotations

from pkgutil import resolve_name

import pytest
from helpers.fake_cuda import Watch, replacements


@pytest.mark.parametrize("name", sorted(replacements(Watch(), "cudnn")))
def test_the_fake_device_replaces_names_that_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert callable(getattr(resolve_name(module), attribute))
