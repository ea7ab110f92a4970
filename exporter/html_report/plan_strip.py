"""The plan as a strip: what every evaluation does at every site, with sites that always do the same in one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...runtime.manifest import Manifest
from ...runtime.plan import PLAN_INPUTS_FILE, Plan
from ..plan import inputs
from ..sites.marks import Action

WHOLE_DENOISER = "the whole denoiser"
ACTION_WORDS: Mapping[Action, str] = {
    "compute": "computed",
    "combine": "predicted from kept values",
    "pass": "run on predicted inputs",
    "zero": "left out, counts as zero",
    "identity": "left out, its input goes on",
}


@dataclass(frozen=True)
class StripRow:
    """Sites, and the action that all of them take at each evaluation."""

    sites: tuple[str, ...]
    actions: tuple[Action, ...]

    @property
    def label(self) -> str:
        """The site, or how many of which."""
        if len(self.sites) == 1:
            return self.sites[0]
        ends = {site.rpartition(".")[2] for site in self.sites}
        what = ends.pop() if len(ends) == 1 else f"{self.sites[0]} to {self.sites[-1]}"
        return f"{len(self.sites)} sites, {what}"


def variant_actions(folder: Path, manifest: Manifest) -> dict[str, dict[str, Action]]:
    """Variant -> site -> action, for sites that do not compute. An artifact that gets no further plans says it less finely:
    there it is what the graphs combine and leave out."""
    if any(entry.path == PLAN_INPUTS_FILE for entry in manifest.files):
        return inputs.read_plan_inputs(folder, manifest).variants
    found: dict[str, dict[str, Action]] = {}
    for graph in manifest.graphs:
        named: dict[str, Action] = dict.fromkeys(graph.combines, "combine")
        named |= dict.fromkeys(graph.zeros, "zero")
        named |= dict.fromkeys(graph.identities, "identity")
        found[graph.name] = named
    return found


def strip_rows(plan: Plan, manifest: Manifest, actions: Mapping[str, Mapping[str, Action]]) -> tuple[StripRow, ...]:
    """The plan's rows, in the order of the sites; without any site, one row that computes."""
    named = (site for variant in plan.variants() for site in actions.get(variant, {}))
    sites = tuple(dict.fromkeys([*(s.name for s in manifest.sites), *named])) or (WHOLE_DENOISER,)
    by_actions: dict[tuple[Action, ...], list[str]] = {}
    for site in sites:
        taken: tuple[Action, ...] = tuple(actions.get(e.variant, {}).get(site, "compute") for e in plan.evaluations)
        by_actions.setdefault(taken, []).append(site)
    return tuple(StripRow(tuple(names), taken) for taken, names in by_actions.items())
