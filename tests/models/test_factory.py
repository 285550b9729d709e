"""How learners are found."""

import pytest

import models
from models import factory
from utils.errors import UserError


@pytest.mark.parametrize("text", ["import not_there_at_all", "def broken(:", "raise SystemError('no')", "1 / 0"])
def test_a_file_that_cannot_be_imported_is_named_and_the_others_stay(text, tmp_path, monkeypatch, caplog):
    (tmp_path / "half_written.py").write_text(text)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(factory, "BROKEN", {})
    factory.find_learners()
    assert "models/half_written cannot be imported" in caplog.text and list(factory.BROKEN) == ["half_written"]
    with pytest.raises(UserError, match=r'learner "half_written": models/half_written cannot be imported \('):
        factory.learner_class("half_written")
    assert factory.learner_class("finetune").__name__ == "Finetune"
