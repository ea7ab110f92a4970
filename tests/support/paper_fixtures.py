import pytest

from support import paper_artifact as paper_artifact


@pytest.fixture
def paper(tmp_path):
    """A good artifact whose machine code is none: see paper.py."""
    return paper_artifact.build(tmp_path / "artifact")


@pytest.fixture
def paper_pipeline(tmp_path):
    """The same with all that a pipeline has, so that `load` takes it."""
    return paper_artifact.build_pipeline(tmp_path / "pipeline")


@pytest.fixture
def never_opened(monkeypatch, tmp_path):
    """Fails the test when anything gets as far as dlopen; the cache is a folder of the test."""
    import prebake.runtime.backends.aoti

    def open_model(so, device, runners):
        raise AssertionError(f"{so} was opened")

    monkeypatch.setattr(prebake.runtime.backends.aoti, "open_model", open_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def opens(monkeypatch, tmp_path):
    """Lets a paper artifact be opened; the list that comes out fills with its models. The cache is a folder of the test."""
    import prebake.runtime.backends.aoti

    models = []

    def open_model(so, device, runners):
        models.append(paper_artifact.PaperModel(so))
        return models[-1]

    monkeypatch.setattr(prebake.runtime.backends.aoti, "open_model", open_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return models
