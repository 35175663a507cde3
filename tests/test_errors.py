"""The error types, and the helpers that word them."""

import pytest

from embedkit.errors import (
    EmbedkitError,
    InputError,
    MissingExtraError,
    OutputError,
    StoreError,
    StoreNotFoundError,
    did_you_mean,
    require,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InputError, ValueError),
        (StoreError, ValueError),
        (StoreNotFoundError, FileNotFoundError),
        (StoreNotFoundError, StoreError),
        (OutputError, OSError),
        (MissingExtraError, ImportError),
    ],
)
def test_every_error_is_ours_and_a_builtin_one(error, builtin):
    assert issubclass(error, EmbedkitError)
    assert issubclass(error, builtin)
    assert str(error("one line")) == "one line"


def test_require_imports_what_is_there():
    assert require("json.decoder", "train").JSONDecoder


def test_require_names_the_extra():
    with pytest.raises(
        MissingExtraError,
        match=r'^no_such_module is not installed; in the folder of embedkit: pip install "\.\[plot\]"$',
    ):
        require("no_such_module.sub", "plot")


def test_require_lets_a_broken_installation_show(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import its_own_dependency_is_gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_dependency_is_gone") as caught:
        require("half_installed", "train")
    assert not isinstance(caught.value, MissingExtraError)


def test_did_you_mean():
    assert did_you_mean(["store"], ["Store", "Day"]) == " (did you mean 'Store'?)"
    assert did_you_mean(["Stor", "Dya"], ["Store", "Day"]) == " (did you mean 'Store', 'Day'?)"
    assert did_you_mean(["zzz"], ["Store", "Day"]) == ""
