"""Where everything came from: the graph of artifacts, from pixels and text to the last policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fledge.report import graph
from fledge.report.markup import digits
from fledge.report.view import View

SEES = ("vision-encoder", "image-classifier")
READS = ("text-encoder", "causal-lm", "chat-model", "reward-model")


def lineage(views: Sequence[View]) -> str:
    """Across for a desk, down for a phone. A click leads to the stage: its config, its figures, its parents."""
    nodes, edges = family(views)
    if len(views) < 2 and not edges:
        return ""
    return (
        "<section id=lineage><h2>Where it came from</h2>"
        f"<div class=across>{graph.draw(nodes, edges)}</div><div class=down>{graph.draw(nodes, edges, down=True)}</div>"
        "<p class=legend><span>A stage leads to its config, figures and parents.</span></p></section>"
    )


def family(views: Sequence[View]) -> tuple[dict[str, graph.Node], list[tuple[str, str]]]:
    """Nodes by artifact digest and edges parent -> child, from the manifests alone: a moved folder keeps its family."""
    nodes: dict[str, graph.Node] = {}
    edges: list[tuple[str, str]] = []
    for view in views:
        nodes[view.digest or f"run {view.name}"] = graph.Node(view.name, *headline(view), f"#{view.anchor}")

    def visit(me: str, kind: str, stage: str, parents: Mapping[str, Mapping[str, Any]], origin: Any) -> None:
        for parent in parents.values():
            digest = str(parent.get("digest", ""))
            if not digest:
                continue
            known = digest in nodes
            name = str(parent.get("name") or digest[:8])
            nodes.setdefault(digest, graph.Node(name, str(parent.get("kind", "")), plain=True))
            edges.append((digest, me))
            if not known:
                visit(digest, str(parent.get("kind", "")), str(parent.get("stage", "")), parent.get("parents") or {},
                      parent.get("origin"))  # fmt: skip
        if not parents:
            for source in ["elsewhere"] if origin else sources(kind, stage):
                nodes.setdefault(source, graph.Node(source, source=True))
                edges.append((source, me))

    for view in views:
        visit(view.digest or f"run {view.name}", view.kind, view.stage, view.parents, view.manifest.get("origin"))
    first = {k: n for k, n in nodes.items() if n.source}
    return first | nodes, edges


def sources(kind: str, stage: str) -> list[str]:
    """What something without parents was raised from."""
    if kind in SEES or stage.endswith((".mae", ".dino", ".classify")):
        return ["pixels"]
    if kind in READS or stage.endswith((".mlm", ".clm", ".sft")):
        return ["text"]
    return ["pixels", "text"] if kind == "dual-encoder" or stage.endswith(".clip") else []


def headline(view: View) -> tuple[str, str]:
    """The name and the number of the first score of a run; its kind where there is none."""
    if not view.scores:
        return view.kind or view.status.get("state", ""), ""
    score = view.scores[0]
    return score.metric, digits(score.low, score.high)(score.after)
