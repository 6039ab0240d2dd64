"""What a data set holds, as numbers and as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from marsjax.records import GROUP_NAMES, NEW, TEST, TRAIN, VALID, Dataset, Rows

QUANTILES = (0, 10, 30, 50, 70, 90, 100)


def statistics(dataset: Dataset, rows: Rows) -> dict[str, Any]:
    """Counts, sparsity, label rate, activity, splits, groups, coverage and problems, ready for JSON.

    The group "new" is there only where some users have no training events.
    """
    log, items = dataset.log, dataset.items
    length_U = np.diff(log.start_U1)
    n_users, n_items, n_events = len(length_U), len(items.raw_id_N) - 1, len(log.item_E)
    groups = {}
    for number, name in enumerate(GROUP_NAMES):
        member_U = rows.group_U == number
        if number == NEW and not member_U.any():
            continue
        train_U = rows.train_length_U[member_U]
        groups[name] = {
            "users": int(member_U.sum()),
            "training_events": [int(train_U.min()), int(train_U.max())] if len(train_U) else None,
        }
    modalities = {
        name: {
            "width": feature_NF.shape[1],
            "items": float(present_N[1:].mean()),
            "events": float(present_N[log.item_E].mean()),
        }
        for name, (feature_NF, present_N) in items.modalities.items()
    }
    return {
        "name": dataset.name,
        "users": n_users,
        "items": n_items,
        "events": n_events,
        "sparsity_percent": 100.0 * (1 - n_events / (n_users * n_items)),
        "label_rate": float(log.label_E.mean()),
        "mean_length": n_events / n_users,
        "length_quantiles": {str(q): float(np.percentile(length_U, q)) for q in QUANTILES},
        "time_span": [int(log.time_E.min()), int(log.time_E.max())],
        "categories": len(items.category_names) - 1,
        "splits": {
            name: int((rows.split_E == number).sum())
            for name, number in (("train", TRAIN), ("valid", VALID), ("test", TEST))
        },
        "groups": groups,
        "modalities": modalities,
        "problems": [problem._asdict() for problem in dataset.problems],
        "fingerprint": dataset.fingerprint,
    }


def describe(dataset: Dataset, rows: Rows) -> str:
    """The statistics as text for a terminal."""
    s = statistics(dataset, rows)
    lines = [
        f"data          {s['name']}  (fingerprint {s['fingerprint'][:12]})",
        f"users         {s['users']:,}",
        f"items         {s['items']:,}  ({s['categories']} categories)",
        f"events        {s['events']:,}  ({s['sparsity_percent']:.2f}% sparse, {100 * s['label_rate']:.1f}% positive)",
        f"time          {s['time_span'][0]} to {s['time_span'][1]}",
        f"history       mean {s['mean_length']:.2f}; quantiles "
        + ", ".join(f"{q}%: {value:.0f}" for q, value in s["length_quantiles"].items()),
        "splits        " + ", ".join(f"{name} {count:,}" for name, count in s["splits"].items()),
    ]
    for name, group in s["groups"].items():
        span = group["training_events"]
        if name == GROUP_NAMES[NEW]:
            title, text = name, "no training events"
        else:
            title, text = f"{name}-active", f"{span[0]} to {span[1]} training events" if span else "nobody"
        lines.append(f"{title:<14}{group['users']:,} users, {text}")
    for name, modality in s["modalities"].items():
        lines.append(
            f"{name:<14}{modality['width']} features; {100 * modality['items']:.1f}% of items, "
            f"{100 * modality['events']:.1f}% of events"
        )
    lines.append("problems      " + ("none" if not dataset.problems else ""))
    lines += [f"  {p.occurrences:,} x {p.kind}, {p.action}: {', '.join(p.where)}" for p in dataset.problems]
    return "\n".join(lines)
