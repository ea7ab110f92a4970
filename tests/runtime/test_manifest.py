"""The exact bytes that are format version 1. A change here is a new version."""

from prebake.runtime.manifest import Defaults, FileEntry, Manifest, Requires, Source, read_manifest

TINY = """\
{
  "backend": "aoti",
  "channels_last": [],
  "complex": [],
  "defaults": {
    "guidance_scale": 3.5,
    "height": 8,
    "num_frames": null,
    "num_inference_steps": 2,
    "width": 8
  },
  "family": "flux",
  "files": [
    {
      "path": "plans/2.json",
      "sha256": "0000000000000000000000000000000000000000000000000000000000000000",
      "size": 1
    }
  ],
  "graphs": [],
  "layers": {
    "é": [
      "int8",
      "large"
    ]
  },
  "pipeline": {},
  "plans": {
    "2": "plans/2.json"
  },
  "recipe": {},
  "reproducible": true,
  "requires": {
    "device": "cpu",
    "glibc": null,
    "isa": [
      "avx2"
    ],
    "isa_level": "v3",
    "machine": "x86_64",
    "packages": {},
    "system": "Linux",
    "torch": "2.13"
  },
  "schema_version": 2,
  "sites": [],
  "source": {
    "inversions": [],
    "loras": [],
    "model": "m",
    "pipeline": "FluxPipeline",
    "sha256": "00"
  },
  "status": "unverified",
  "toolchain": {},
  "unverified": []
}
"""


def tiny():
    return Manifest(
        family="flux",
        requires=Requires(system="Linux", machine="x86_64", device="cpu", isa_level="v3", isa=("avx2",), torch="2.13"),
        source=Source(model="m", pipeline="FluxPipeline", sha256="00"),
        toolchain={},
        recipe={},
        defaults=Defaults(num_inference_steps=2, guidance_scale=3.5, height=8, width=8),
        pipeline={},
        layers={"é": ("int8", "large")},
        graphs=(),
        plans={"2": "plans/2.json"},
        files=(FileEntry(path="plans/2.json", size=1, sha256="0" * 64),),
    )


def test_a_tiny_manifest_has_these_bytes():
    assert tiny().to_json() == TINY


def test_what_is_written_is_what_is_read(tmp_path):
    (tmp_path / "manifest.json").write_text(TINY, "utf-8")
    assert read_manifest(tmp_path) == tiny()
