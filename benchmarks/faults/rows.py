"""Rows of the table of faults, of which each says what a record says."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def row(r: Record) -> str | None:
    """A record's row; None where it has none (a save's costs are a sentence below the table)."""
    name = r["provider"]
    if "places" in r:
        cells = _placed(r)
    elif "expected" in r:
        cells = _trials(r)
    elif name.startswith("SIGKILL"):
        cells = _kills(r)
    elif name in ("host killed", "link pulled"):
        cells = _hosts(r)
    elif name == "disk full":
        happened = (
            f"a warning, {len(r['logged'])} of {r['last']} steps logged; saved again once there "
            "was room"
        )
        cells = (str(r["count"]), happened, "nothing")
    elif name == "flipped byte":
        happened = "refused by name with a warning, the checkpoint before it used"
        cells = (str(r["count"]), happened, f"the steps from {r['before']} to {r['last']}")
    elif "fault" in r:
        cells = _planted(r)
    else:
        return None
    return f"| {' | '.join((name, *cells))} |"


def in_short(records: list[Record]) -> str:
    """Say how many faults there were and how many ended as they should, in half a sentence."""
    faults = [r for r in records if row(r)]
    count = sum(r["count"] for r in faults)
    right = sum(map(_right, faults))
    return f"{right} of {count} injected faults of {len(faults)} kinds ended as they should"


def _right(r: Record) -> int:
    """Count those of a record's faults that ended as they should."""
    if "right" in r:
        return r["right"]
    if r["provider"].startswith("SIGKILL"):
        right = not r["different"] and r["same_losses"]
    elif "end" in r:
        right = not any(r["end"]["codes"])
    elif "logged" in r:  # of both files
        full = r["logged"] == list(range(1, r["last"] + 1))
        right = full if r["provider"] == "disk full" else r["resumed"] == r["before"]
    else:
        right = not any(r["codes_again"])
    return r["count"] * right


Cells = tuple[str, str, str]
"""How often, what happened, what was lost."""


def _placed(r: Record) -> Cells:
    calls = ", ".join(f"{count} {name}" for name, count in sorted(r["calls"].items()))
    if r["resumed"] == r["count"]:
        happened = "resumed every time"
    else:
        happened = f"resumed {r['resumed']} times, NOT {r['count'] - r['resumed']} times"
    if r["reached"] < r["count"]:
        happened += f"; {r['count'] - r['reached']} places were NOT reached"
    happened += f"; counted and killed by {r['by']}"
    if r["left"]:
        happened += f"; LEFT: {len(r['left'])} temporary files"
    same = f"{r['same_bits']} of {r['count']} times"
    lost = (
        f"{r['steps_lost_most']} steps at most; the {r['tensors']} tensors of the last checkpoint "
        f"and the losses equal an undisturbed run's bit for bit {same}"
    )
    return f"{r['count']} of {r['places']} places ({calls})", happened, lost


def _trials(r: Record) -> Cells:
    if r["right"] == r["count"]:
        happened = r["expected"]
    else:
        saw = "; or ".join(r["saw"][:2])
        happened = f"NOT AS EXPECTED {r['count'] - r['right']} of {r['count']} times: {saw}"
    if r.get("seconds_most") is not None:
        happened += f"; the last after {r['seconds_most']:.1f} s"
    lost = "nothing" if r["right"] == r["count"] else ""
    if r["steps_lost_most"]:
        lost = f"{r['steps_lost_most']} steps at most"
    return str(r["count"]), happened.replace("|", "/"), lost


def _kills(r: Record) -> Cells:
    codes = " and ".join(sorted(r["survivor_codes"]))
    same = "bit for bit" if not r["different"] and r["same_losses"] else "NOT"
    times = f"{r['count']}, {r['during_save']} of them while a checkpoint was written"
    happened = (
        f"resumed every time; the rank that was left ended after {r['survivor_seconds']:.1f} s "
        f"at most ({r['one_rank']} times, exit code {codes})"
    )
    lost = (
        f"{r['steps_lost']} steps were taken again in a run of {r['steps']}, "
        f"{r['steps_lost_most']} at most after a kill; its {r['tensors']} tensors (weights, "
        f"EMA, optimiser) equal an undisturbed run's {same}"
    )
    return times, happened, lost


def _hosts(r: Record) -> Cells:
    sides = " and ".join(
        e.split("error")[1].split(" lost:")[0].lstrip("( :").replace("rank 1): ", "")
        for lines in r["errors"]
        for e in lines
    )
    who = "both sides" if " and " in sides else "the other side"
    happened = (
        f"{who} ended after {r['seconds']:.1f} s, naming {sides}; training again "
        f"{r['took_up_seconds']:.0f} s later"
    )
    return str(r["count"]), happened, f"{r['step'] - r['resumed']} steps since the checkpoint"


def _planted(r: Record) -> Cells:
    after = f" after {r['seconds']:.1f} s" if r["seconds"] is not None else ""
    said = r["errors"][0].split(": ", 2)[2].split(";")[0] if r["errors"] else "saved"
    happened = f"the others ended{after} with exit code {r['exit_code']}: {said.rstrip('.')}"
    if any(r["codes_again"]):
        happened += "; DID NOT RESUME"
    return str(r["count"]), happened, f"{r['step'] - r['resumed']} steps"
