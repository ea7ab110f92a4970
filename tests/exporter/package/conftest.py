"""An artifact on paper, a key, and the artifact signed with it."""

from __future__ import annotations

import pytest


@pytest.fixture
def keys(tmp_path):
    """A private key and its public one."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from support.signed_artifacts import write_keys

    return write_keys(tmp_path, "mine", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def artifact(tmp_path):
    from support import paper_artifact as paper

    return paper.build(tmp_path / "artifact")


@pytest.fixture
def signed(artifact, keys):
    from prebake.exporter.package.sign import sign_artifact
    from support.signed_artifacts import FILES

    assert sign_artifact(artifact, keys[0]) == FILES
    return artifact
