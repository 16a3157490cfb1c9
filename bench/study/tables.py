"""The study's tables: which variants of which task are compared, and by what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.study import choices, diamond, letters, loops, pictures, rounds
from bench.study.compare import Comparison, Variant

JOINT = {"method": "joint"}
LETTERS = ("exact", "quality", "win against chosen", "win against prompted", "draft exact")
PICTURES = ("order consistency", "preference score", "captions in order", "three images")
SORTED = ("exact", "quality")
LOSSES = {
    "DPO": {},
    "cDPO": {"label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "IPO": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
}


def methods(names: Sequence[str], untrained: Sequence[str], **options: Any) -> list[Variant]:
    return [
        Variant(name=n, options={"method": n, **options}, trains=n not in untrained, staged=n == "stage by stage")
        for n in names
    ]


def sampling(name: str, **options: Any) -> Variant:
    return Variant(name=name, options=JOINT | options, tuned_as=JOINT)


def joint_and(joint: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """The joint row, and with it each change by itself at the joint row's learning rate."""
    changed = [
        Variant(name=f"joint, {name}", options={**joint, **change}, tuned_as=joint) for name, change in changes.items()
    ]
    return [Variant(name="joint", options=joint), *changed]


def searched(k: int, penalty: float) -> Mapping[str, Any]:
    return {"num_candidates": k, "diversity_penalty": penalty}


DIGITS = {"world": "digits", "method": "joint"}
CAPTIONER = [
    *joint_and(
        DIGITS,
        {
            "captioner at a third of its rate": {"factors": {"text": 1 / 3}},
            "captioner at a tenth of its rate": {"factors": {"text": 0.1}},
            "twice the pairs a step": {"times_pairs": 2},
        },
    ),
    Variant(name="separate", options={"world": "digits", "method": "separate"}),
]
SHAPES = {"world": "shapes", "method": "joint"}
ONLY_PAINTER = {"world": "shapes", "method": "only the diffusion model"}
PAINTER = [
    Variant(name="before", options={"world": "shapes", "method": "before"}, trains=False),
    *joint_and(
        SHAPES,
        {"painter at three times its rate": {"factors": {"image": 3.0}}, "four times the steps": {"times_steps": 4}},
    ),
    Variant(name="only the diffusion model", options=ONLY_PAINTER),
    Variant(
        name="only the diffusion model, four times the steps",
        options=ONLY_PAINTER | {"times_steps": 4}, tuned_as=ONLY_PAINTER,
    ),
]  # fmt: skip
CANDIDATES = [
    Variant(name="joint", options=JOINT),
    *(
        sampling(f"diverse beam search, k = {k}, penalty {penalty:g}", candidates=searched(k, penalty))
        for k in (2, 4, 8)
        for penalty in (0.5, 2.0, 20.0)
    ),
    *(
        sampling(f"{name}, k = {k}", strategy=strategy, candidates={"num_candidates": k})
        for name, strategy in (("Monte Carlo", "mc"), ("importance sampling", "is"))
        for k in (2, 4, 8, 16)
    ),
    sampling("from the policy, drawn once", options={"candidates_refresh_steps": 10_000}),
    sampling("from the reference", options={"candidates_from": "reference"}),
    sampling(
        "from the reference, drawn once",
        options={"candidates_from": "reference", "candidates_refresh_steps": 10_000},
    ),
    Variant(name="Direct, drafts observed", options={"method": "direct"}),
]
MISLED = [
    Variant(
        name=f"{method}, {loss}, {rate:.0%} misled",
        options={"method": method, "misled": rate, "options": LOSSES[loss]},
        tuned_as={"method": method},
    )
    for method in ("joint", "direct")
    for loss in ("DPO", "robust")
    for rate in (0.0, 0.1, 0.25, 0.5)
]
NOISE = [
    Variant(
        name=f"{loss}, {rate:.0%} flipped",
        options={"method": "direct", "flipped": rate, "options": options},
        tuned_as={"method": "direct", "options": options},
    )
    for loss, options in LOSSES.items()
    for rate in (0.0, 0.1, 0.2, 0.3)
]
SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
REFINER = [
    *joint_and(
        JOINT,
        {
            "refiner at a third of its rate": {"factors": {"answer": 1 / 3}},
            "refiner at a tenth of its rate": {"factors": {"answer": 0.1}},
            "with SFT on the chosen": {"options": SFT},
        },
    ),
    Variant(name="only draft", options={"method": "only draft"}),
]
UNROLLED = {"method": "unrolled", "rounds": 3}
OF_THREE_ROUNDS = [
    *methods((*loops.METHODS, "unrolled, direct"), ["before"], rounds=3),
    Variant(name="unrolled, 16 candidates", options=UNROLLED | {"candidates": 16}, tuned_as=UNROLLED),
]
RETRIEVED = {"system": "retriever", "method": "joint"}
ROUTED = {"system": "router", "method": "joint"}
CHOOSER = [
    *joint_and(
        ROUTED,
        {
            "choice at nine times its rate": {"factors": {"route": 9.0}},
            "specialists at a tenth of their rate": {"factors": {"answer": 0.1}},
            "both": {"factors": {"route": 9.0, "answer": 0.1}},
        },
    ),
    Variant(name="only the choice", options=ROUTED | {"method": "only the choice"}),
]
READER = [
    *joint_and(
        RETRIEVED,
        {
            "reader at a tenth of its rate": {"factors": {"answer": 0.1}},
            "reader at a hundredth of its rate": {"factors": {"answer": 0.01}},
            "with SFT on the chosen": {"options": SFT},
        },
    ),
    Variant(name="only the choice", options=RETRIEVED | {"method": "only the choice"}),
]
CREDIT = [
    Variant(
        name=f"{method}, {damaged or 'nothing'} damaged",
        options={"method": method, "damaged": damaged},
        tuned_as={"method": method},
    )
    for method in ("joint", "direct")
    for damaged in ("", "draft", "answer")
]


def _comparisons() -> list[Comparison]:
    return [
        Comparison(
            name="pictures-digits", function="pictures:align", metrics=PICTURES, reference="joint", seeds=5,
            variants=methods(pictures.METHODS, list(pictures.UNTRAINED), world="digits"),
        ),
        Comparison(
            name="pictures-shapes", function="pictures:align", metrics=PICTURES, reference="joint", seeds=3,
            variants=methods(pictures.METHODS, list(pictures.UNTRAINED), world="shapes"),
        ),
        Comparison(
            name="captioner", function="pictures:align", metrics=PICTURES, reference="joint", seeds=5,
            variants=CAPTIONER,
        ),
        Comparison(
            name="painter", function="pictures:align", metrics=PICTURES, reference="joint", seeds=3, variants=PAINTER
        ),
        Comparison(
            name="draft-refine", function="letters:align", metrics=LETTERS, reference="joint", seeds=5,
            variants=methods(letters.METHODS, list(letters.UNTRAINED)),
        ),
        Comparison(
            name="draft-refine-large", function="letters:align", metrics=LETTERS, reference="joint", seeds=3,
            variants=methods(letters.METHODS, list(letters.UNTRAINED), scale="large"), device="cuda",
        ),
        Comparison(
            name="refiner", function="letters:align", metrics=LETTERS, reference="joint", seeds=5, variants=REFINER
        ),
        Comparison(
            name="candidates", function="letters:align", metrics=LETTERS, reference="joint", seeds=3,
            variants=CANDIDATES,
        ),
        *(
            Comparison(
                name=f"critic-loop-{rounds}", function="loops:align", metrics=SORTED, reference="unrolled", seeds=3,
                variants=OF_THREE_ROUNDS if rounds == 3 else methods(loops.METHODS, ["before"], rounds=rounds),
            )
            for rounds in (1, 2, 3, 4)
        ),
        Comparison(
            name="misled-drafts", function="letters:align", metrics=LETTERS, reference="joint, DPO, 0% misled", seeds=3,
            variants=MISLED,
        ),
        *(
            Comparison(
                name=system, function="choices:align", metrics=(*SORTED, "right choice"), reference="joint", seeds=3,
                variants=methods(choices.METHODS, ["before"], system=system),
            )
            for system in choices.SYSTEMS
        ),
        Comparison(
            name="chooser", function="choices:align", metrics=(*SORTED, "right choice"), reference="joint", seeds=3,
            variants=CHOOSER,
        ),
        Comparison(
            name="reader", function="choices:align", metrics=(*SORTED, "right choice"), reference="joint", seeds=3,
            variants=READER,
        ),
        Comparison(
            name="diamond", function="diamond:align", metrics=(*SORTED, "right choice"), reference="joint", seeds=3,
            variants=methods(diamond.METHODS, ["before"]),
        ),
        Comparison(
            name="noise", function="letters:align", metrics=LETTERS, reference="DPO, 0% flipped", seeds=3,
            variants=NOISE,
        ),
        Comparison(
            name="credit", function="letters:align", metrics=("exact", "draft share"), seeds=3,
            reference="joint, nothing damaged", variants=CREDIT,
        ),
        Comparison(
            name="rounds", function="rounds:align", metrics=("exact",), reference="one training", seeds=5,
            variants=[Variant(name=m, options={"method": m}, trains=False) for m in ("before", *rounds.METHODS)],
        ),
    ]  # fmt: skip


TABLES = {table.name: table for table in _comparisons()}
