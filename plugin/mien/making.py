"""Making a pack for a model from a corpus: directions, then doses, then what they are worth.

    maker = Maker(path, corpus, folder)
    pack = maker.make(name="smollm2-135m-instruct", version="1.0.0", licence="Apache-2.0")

Each stage is kept in the folder `.making` beside the pack under a key over all that it uses: the model, the
texts that it evaluates, the settings that it reads and the vectors that it measures. So an interrupted run
resumes where it left off, and after a change of the data only the stages that use what changed run again. The
same run on the same machine gives the same bytes.

Splits: directions come from the train split; dose and middle from the calibration split; everything that the
files claim about a vector (accuracy, effect, leakage, examples) is measured on the test split.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from .calibration import BUDGETS, Budget, Calibration, Dose, Poles, Scores, bake, calibrate, measure, raised
from .contrast import Sample
from .corpus import Corpus, Event, Group, Pair, Trait
from .errors import MienError
from .evaluation import Evaluator, Progress, Text
from .extraction import Reading, layers_to_keep, middle, read_states, vector_between, vector_of
from .fingerprint import Fingerprint
from .judging import Probe, gap, spearman
from .pack import Pack, write_whole
from .program import NOTHING, Program
from .vector import Floats, MetaValue, Vector, purified
from .vectorfile import load

METHODS = ("trained", "mean")
PROMPTS = 8  # that a dose is measured on
REPLY_TOKENS = 40
COEFFICIENTS = {  # of the raw rows; trained ones are of a length that works
    "trained": (0.15, 0.22, 0.3, 0.4, 0.52, 0.68, 0.9, 1.2),
    "mean": (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45),
}
AGAIN = (0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 3.0)  # of a vector that has had a full dose
ITEMS = 8  # given replies of each pole that an effect is measured on
CROSS = 8  # items that cross effects are measured on, or as many as the split has
ROUNDS, TRAIT_ROUNDS = 2, 3  # of training; a trait has fewer texts than a group
DOSES = tuple(k / 8 for k in range(9))
EXAMPLE_DOSES = DOSES[::2]
RANDOM = 2  # random directions that a vector is compared with
MONOTONE = 0.95
LEAK, KEEP = 0.5, 0.9  # shares of a vector's own effect: what is a leak, and what must stay
DROP = 0.3  # the share by which purifying must lessen a leak, for as much of the own effect
SHOWN, PROBED = 24, 2 / 3  # replies that are looked at for what they show, and the depth they are read at
READ_TEXTS = 4
FIRST, LAST = 0.2, 0.95  # blocks that are steered, as shares of the depth: the ends cost fluency

Stage = Callable[[str], Progress]
Item = TypeVar("Item")
Lesson: TypeAlias = "tuple[str, float, Text]"  # a vector's name, its coefficient, the reply to train on


@dataclass(frozen=True)
class Settings:
    """method: one of METHODS. layers: blocks to steer; () for those between FIRST and LAST of the depth.
    budgets: by kind."""

    method: str = "trained"
    layers: tuple[int, ...] = ()
    budgets: Mapping[str, Budget] = field(default_factory=lambda: BUDGETS)
    seed: int = 0


def pack_name(model: Fingerprint) -> str:
    """What a pack for that model may be called."""
    words = re.findall(r"[a-z0-9]+", f"{model.name or model.architecture}".lower())
    return "-".join(words)[:64] or "pack"


def quiet(_stage: str) -> Progress:
    return lambda _done, _total: None


class Maker:
    """Makes one pack. stage: called with the name of what begins, it gives the progress for it."""

    def __init__(
        self,
        many: Evaluator,
        corpus: Corpus,
        folder: str | Path,
        *,
        settings: Settings | None = None,
        trainable: Callable[[], Any] | None = None,
        stage: Stage = quiet,
    ) -> None:
        """many: the model. trainable: gives the model in transformers, for the method `trained`.

        Raises MienError for an unknown method, layers that the model lacks, or nothing to train.
        """
        settings = settings or Settings()
        if settings.method not in METHODS:
            raise MienError(f"method: expected one of {', '.join(METHODS)}, got {settings.method!r}")
        if settings.method == "trained" and trainable is None:
            raise MienError("the method trained needs the model in transformers, too")
        n_layer = many.fingerprint.n_layer
        most = range(max(1, round(FIRST * n_layer)), min(max(2, round(LAST * n_layer)) + 1, n_layer))
        self.layers = layers_to_keep(settings.layers or most, many.fingerprint)
        self.many, self.corpus, self.folder, self.settings = many, corpus, Path(folder), settings
        self._trainable, self._stage = trainable, stage
        self._model: Any = None  # what _trainable gave
        self._plains: dict[object, Dose] = {}
        self._plain_scores: dict[str, Scores] = {}  # of what is crossed, by name
        self._cache = self.folder / ".making"
        self._families: dict[str, list[Trait | Group]] = {}
        every: list[Trait | Group] = [*corpus.groups, *corpus.traits]
        for entry in every:
            self._families.setdefault(entry.family, []).append(entry)

    def make(self, *, name: str, version: str, licence: str, description: str = "") -> Pack:
        """All stages. Raises MienError; what was done before stays for the next time."""
        self.folder.mkdir(parents=True, exist_ok=True)  # before an hour of work, not after
        try:
            return self._made(name=name, version=version, licence=licence, description=description)
        finally:
            with suppress(OSError):
                self.folder.rmdir()  # which only an empty one is

    def _made(self, **manifest: str) -> Pack:
        vectors: dict[str, Vector] = {}
        for raw in self._raw():
            vectors[raw.name] = self._calibrated(raw.name, raw)
        for family in self._families.values():
            self._purify([name for entry in family for name in _names(entry)], vectors)
        read = self._readouts(vectors)
        for vector in vectors.values():
            found = self._evaluated(vector)
            known = {**vector.meta, **found, **read[vector.name], "licence": manifest["licence"]}
            replace(vector, meta=known).save(self.folder / f"{vector.name}.gguf")
        return Pack.build(self.folder, **manifest)

    # ---- directions ----

    def _raw(self) -> Iterator[Vector]:
        """Every vector, of any length."""
        rows = self._trained() if self.settings.method == "trained" else {}
        for entries in self._families.values():
            for entry in entries:
                own = {name: rows[name] for name in _names(entry) if name in rows}
                key = self._key(entry.digest, self.settings.method, {n: r.tobytes() for n, r in own.items()})
                kept = self._load_vectors(entry, key)
                if len(kept) < len(_names(entry)):
                    made = self._group(entry, own) if isinstance(entry, Group) else [self._trait(entry, own)]
                    for vector in made:
                        known = {**vector.meta, "making": key}
                        replace(vector, meta=known).save(self._cache / f"{vector.name}.gguf")
                    # Read again, since a file rounds: a run that goes on has the same numbers.
                    kept = self._load_vectors(entry, key)
                yield from kept

    def _load_vectors(self, entry: Trait | Group, key: str) -> list[Vector]:
        """The vectors of an entry that were kept under that key."""
        paths = [self._cache / f"{name}.gguf" for name in _names(entry)]
        vectors = [load(path) for path in paths if path.exists()]
        own = [vector for vector in vectors if vector.meta.get("making") == key]
        return [replace(v, meta={k: x for k, x in v.meta.items() if k != "making"}) for v in own]

    def _trained(self) -> dict[str, Floats]:
        """{name: rows} of every vector, a family at a time."""
        rows: dict[str, Floats] = {}
        for family, entries in self._families.items():
            rounds = ROUNDS if any(isinstance(entry, Group) for entry in entries) else TRAIT_ROUNDS
            rows |= self._train(family, list(_lessons(entries, self._text)), rounds)
        return rows

    def _train(self, stage: str, lessons: Sequence[Lesson], rounds: int) -> dict[str, Floats]:
        """What is trained on the lessons, or was in an earlier run."""
        path, seed = self._cache / f"{stage}.npz", self.settings.seed
        key = self._key(lessons, rounds, seed)
        if (kept := _load_rows(path, key)) is not None:
            return kept
        from .training import Example, train

        progress = self._stage(f"training {stage}")
        if self._model is None:
            assert self._trainable is not None
            self._model = self._trainable()
        examples = [Example(*lesson) for lesson in lessons]
        found = train(self._model, examples, self.layers, rounds=rounds, seed=seed, progress=progress)
        arrays: dict[str, Any] = {"key": np.array(key), **found}
        np.savez(buffer := BytesIO(), **arrays)
        write_whole(path, buffer.getvalue())  # half a file would stop the next run
        return found

    def _group(self, group: Group, rows: Mapping[str, Floats]) -> list[Vector]:
        split = "calibration" if rows else "train"
        reading = self._read(_samples(group, group.of(split, replied=True)), f"reading {group.family}")
        test = self._read(_samples(group, group.of("test", replied=True)[::2]), f"reading {group.family}")
        meta = {
            name: self._meta(group) | {"positive": positive, "negative": "the mean of the group"}
            for name, positive in group.members.items()
        }
        return [self._vector(name, reading, name, rows, meta[name], test) for name in group.members]

    def _trait(self, trait: Trait, rows: Mapping[str, Floats]) -> Vector:
        reading = self._read(_poles_of(trait.of("calibration" if rows else "train")), f"reading {trait.name}")
        test = self._read(_poles_of(trait.of("test")[:ITEMS]), f"reading {trait.name}")
        meta = self._meta(trait) | {"positive": trait.positive, "negative": trait.negative}
        return self._vector(trait.name, reading, "positive", rows, meta, test)

    def _read(self, samples: Mapping[str, Sequence[Sample]], stage: str) -> Reading:
        progress = self._stage(stage)
        return read_states(self.many, samples, read="mean", layers=self.layers, progress=progress)

    def _meta(self, entry: Trait | Group) -> dict[str, MetaValue]:
        return {"kind": _kind(entry), "family": entry.family, "data_digest": entry.digest}

    def _vector(
        self,
        name: str,
        reading: Reading,
        positive: str,
        rows: Mapping[str, Floats],
        meta: Mapping[str, MetaValue],
        test: Reading,
    ) -> Vector:
        if rows:
            # On a prompt, too, it would blur what the prompt says: the replies are much alike then.
            how = {"method": "trained on replies of both poles", "when": "response"}
            vector = vector_of(name, rows[name], middle(reading), reading, {**meta, **how})
        else:
            how = {"method": "mean, mean of the reply"}
            vector = vector_between(name, reading, positive, "mean", {**meta, **how})
        return replace(vector, meta={**vector.meta, "accuracy": _accuracy(vector, test, positive)})

    # ---- doses ----

    def _calibrated(self, name: str, vector: Vector, coefficients: Sequence[float] = ()) -> Vector:
        """The vector, scaled; name: of the stage, for a vector may be scaled again after it was purified."""

        budget = self.settings.budgets[_kind(self._entry(vector.name))]
        prompts = self.prompts(vector.name, "calibration")
        coefficients = coefficients or COEFFICIENTS[self.settings.method]

        def find() -> dict[str, Any]:
            found = calibrate(
                self.many,
                vector,
                prompts,
                coefficients=coefficients,
                budget=budget,
                reply_tokens=REPLY_TOKENS,
                plain=self._plain(vector.name),
                strict=False,
                progress=self._stage(f"dosing {name}"),
            )
            return {"curve": [asdict(dose) for dose in found.curve], "chosen": found.chosen}

        kept = self._kept(f"dose-{name}", find, vector, prompts, coefficients, budget, REPLY_TOKENS)
        curve = tuple(Dose(**dose) for dose in kept["curve"])
        found = Calibration(curve, kept["chosen"], budget)
        baked = bake(vector, found)
        return replace(baked, meta={**baked.meta, "calibration.holds": found.holds})

    def _plain(self, name: str) -> Dose:
        """The unsteered replies to a vector's prompts."""
        prompts = self.prompts(name, "calibration")
        if (key := tuple(prompt.tokens for prompt in prompts)) not in self._plains:
            self._plains[key] = measure(self.many, [NOTHING], prompts, REPLY_TOKENS)[0]
        return self._plains[key]

    # ---- what a vector does beside ----

    def _purify(self, names: Sequence[str], vectors: dict[str, Vector]) -> None:
        """Measure a family's cross effects, and take out of each vector what it shares where that helps.

        Of the other that it brings about most: it is left out where, at the purer vector's own full dose, at
        least KEEP of the effect stays, the other's share of it falls by at least DROP, and no fewer of the
        model's own replies show the manner. What was found is added to the metadata.
        """
        if len(names) < 2:
            return
        progress = self._stage(f"crossing {self._entry(names[0]).family}")
        given = {name: vectors[name] for name in names}
        before: dict[str, dict[str, float]] = {name: {} for name in names}
        for i, other in enumerate(names):  # by what is judged, since its prompts are the same for all
            for name, effect in zip(names, self._effects(f"cross-{other}", other, list(given.values()))):
                before[name][other] = effect
            progress(i + 1, len(names))
        for name in names:
            effects = before[name]
            other = max((o for o in names if o != name), key=lambda o: abs(effects[o]))
            words: dict[str, MetaValue] = {"leakage.names": list(names)}
            if effects[name] > 0 and abs(effects[other]) >= LEAK * effects[name]:
                words["leakage.before"] = [effects[o] for o in names]
                words["leakage.tried"] = other
                purer = purified(given[name], [given[other]])
                purer = replace(purer, name=name, meta={**_lasting(given[name], purer), **purer.meta})
                # A dose of its own takes long to find, so that first both effects are compared without.
                if _is_purer(name, other, effects, self._crossed(f"{name}-tried", purer, (name, other))):
                    scaled = self._calibrated(f"{name}-purified", purer, AGAIN)
                    after = self._crossed(f"{name}-purified", scaled, names)
                    kept = after[name] >= KEEP * effects[name] and _is_purer(name, other, effects, after)
                    if kept and self._shown(f"{name}-purified", scaled) >= self._shown(name, given[name]):
                        vectors[name], effects = scaled, after
                        words["purified"] = other
            words["leakage.effect"] = [effects[o] for o in names]
            vectors[name] = replace(vectors[name], meta={**vectors[name].meta, **words})

    def _crossed(self, stage: str, vector: Vector, names: Sequence[str]) -> dict[str, float]:
        """{name: by how much full dose of `vector` raises its GAP}."""
        return {name: self._effects(f"cross-{stage}-{name}", name, [vector])[0] for name in names}

    def _effects(self, stage: str, name: str, vectors: Sequence[Vector]) -> list[float]:
        """By how much full dose of each vector raises the GAP of `name`."""
        poles = self._poles(name, "calibration", CROSS)

        def find() -> list[float]:
            if name not in self._plain_scores:
                self._plain_scores[name] = poles.scores(self.many, [NOTHING])[0]
            steered = poles.scores(self.many, [self.many.compile(vector) for vector in vectors])
            return [raised(self._plain_scores[name], scores).value for scores in steered]

        return list(self._kept(stage, find, poles, *vectors))

    def _shown(self, stage: str, vector: Vector) -> float:
        """The share of the model's own replies to the calibration split that show the manner at full dose."""
        entry, layer = self._entry(vector.name), round(PROBED * (self.many.fingerprint.n_layer - 1))
        if isinstance(entry, Group):
            sides = _samples(entry, entry.of("calibration", replied=True))
            asks, own = [event.text for event in entry.of("calibration")], vector.name
        else:
            sides = _poles_of(entry.of("calibration"))
            asks, own = [pair.ask for pair in entry.of("calibration")], "positive"
        prompts = [self._text(ask) for ask in _spread(asks, SHOWN)]

        def find() -> float:
            probe = Probe(read_states(self.many, sides, read="mean", layers=[layer]))
            every = [self.many.compile(vector)] * len(prompts)
            replies = self.many.generate(prompts, REPLY_TOKENS, programs=every)
            told = [reply for reply in replies if reply.answer]
            states = [rows[0].mean(axis=0) for _, rows in self.many.capture(told, [layer])]
            return probe(np.array(states, dtype=np.float64)).count(own) / len(replies) if told else 0.0

        return float(self._kept(f"shown-{stage}", find, vector, sides, own, layer, prompts, REPLY_TOKENS))

    def _readouts(self, vectors: Mapping[str, Vector]) -> dict[str, dict[str, MetaValue]]:
        """By vector, how far full dose of it moves each readout; 1: what that one adds to a layer itself."""
        texts = [
            self._text(event.text, "I see. Tell me what happened next, and how it was for you.")
            for group in self.corpus.groups
            for event in group.of("calibration")
        ][:READ_TEXTS]
        texts = texts or [
            self._text(ask) for ask in (t.pairs[0].ask for t in self.corpus.traits[:READ_TEXTS])
        ]
        rows = np.stack([np.stack([v.directions[n] for n in self.layers]) for v in vectors.values()]).astype(
            float
        )
        squares = (rows**2).sum(axis=(1, 2))

        def states(program: Program) -> Any:
            every = [program] * len(texts)
            last = self.many.capture(texts, self.layers, last=True, programs=every)
            return np.mean([state[:, 0] for _, state in last], axis=0, dtype=np.float64)

        def moved(name: str) -> list[float]:
            shift = states(self.many.compile(vectors[name])) - plain
            return [float(x) for x in (rows * shift).sum(axis=(1, 2)) / squares]

        plain, progress = states(NOTHING), self._stage("reading across")
        found: dict[str, dict[str, MetaValue]] = {}
        for i, name in enumerate(vectors):
            found[name] = {
                "readout.names": list(vectors),
                "readout.moved": self._kept(
                    f"read-{name}", partial(moved, name), name, texts, *vectors.values()
                ),
            }
            progress(i + 1, len(vectors))
        return found

    # ---- what it is worth ----

    def _evaluated(self, vector: Vector) -> dict[str, MetaValue]:
        progress = self._stage(f"testing {vector.name}")
        poles, prompt = self._poles(vector.name, "test"), self.prompts(vector.name, "test")[0]
        find = partial(self._evaluate, vector, poles, prompt, progress)
        said = self._ask(vector.name), vector.meta["calibration.holds"]
        return dict(self._kept(f"test-{vector.name}", find, vector, poles, prompt, *said, DOSES, RANDOM))

    def _evaluate(self, vector: Vector, poles: Poles, prompt: Text, progress: Progress) -> dict[str, Any]:
        many = self.many
        programs = [many.compile(vector * dose) if dose else NOTHING for dose in DOSES]
        random = [many.compile(_random_like(vector, k)) for k in range(RANDOM)]
        scores = poles.scores(many, [*programs, *random])
        effects = [gap(high, low).value for high, low in scores]
        shift = raised(scores[0], scores[len(DOSES) - 1])
        progress(1, 2)
        examples = many.generate(
            [prompt] * len(EXAMPLE_DOSES),
            48,
            programs=[programs[DOSES.index(dose)] for dose in EXAMPLE_DOSES],
        )
        progress(2, 2)
        found: dict[str, Any] = {
            "test.dose": list(DOSES),
            "test.curve": [effect - effects[0] for effect in effects[: len(DOSES)]],
            "test.spearman": spearman(DOSES, effects[: len(DOSES)]),
            "test.effect": shift.value,
            "test.effect_interval": [shift.low, shift.high],
            "test.items": shift.items,
            "test.random_effect": [effect - effects[0] for effect in effects[len(DOSES) :]],
            "example.prompt": self._ask(vector.name),
            "example.dose": list(EXAMPLE_DOSES),
            "example.reply": [many.decode(text.answer) for text in examples],
        }
        reasons = [] if vector.meta["calibration.holds"] else ["no dose of it keeps to the budget"]
        if not found["test.spearman"] >= MONOTONE:
            reasons.append(
                f"its effect does not grow steadily with the dose (Spearman {found['test.spearman']:.2f})"
            )
        if shift.low <= 0:
            reasons.append("its effect on new replies is not told from none")
        if found["test.curve"][-1] <= max(found["test.random_effect"]):
            reasons.append("random directions of its length do as much")
        return {**found, **({"weak": "; ".join(reasons)} if reasons else {})}

    # ---- texts ----

    def _entry(self, name: str) -> Trait | Group:
        return next(
            e
            for entries in self._families.values()
            for e in entries
            if (name in e.members if isinstance(e, Group) else e.name == name)
        )

    def _text(self, ask: str, reply: str = "") -> Text:
        return self.many.text([{"role": "user", "content": ask}], reply)

    def prompts(self, name: str, split: str) -> list[Text]:
        """What a vector's doses are measured on: questions of its own, and events that fit any."""
        entry = self._entry(name)
        asks = [] if isinstance(entry, Group) else [pair.ask for pair in entry.of(split)][: PROMPTS // 2]
        events = [event.text for group in self.corpus.groups for event in group.of(split)]
        return [self._text(ask) for ask in (asks + _spread(events, PROMPTS))[:PROMPTS]]

    def _ask(self, name: str) -> str:
        entry = self._entry(name)
        return entry.of("test")[0].text if isinstance(entry, Group) else entry.of("test")[0].ask

    def _poles(self, name: str, split: str, limit: int = ITEMS) -> Poles:
        entry = self._entry(name)
        if isinstance(entry, Trait):
            pairs = entry.of(split)[:limit]
            return Poles(
                [self._text(pair.ask, pair.high) for pair in pairs],
                [self._text(pair.ask, pair.low) for pair in pairs],
            )
        events, members = _spread(entry.of(split, replied=True), limit), list(entry.members)
        others = [member for member in members if member != name]
        return Poles(
            [self._text(event.text, event.replies[name]) for event in events],
            [
                self._text(event.text, event.replies[others[i % len(others)]])
                for i, event in enumerate(events)
            ],
        )

    # ---- what is kept between runs ----

    def _key(self, *of: object) -> str:
        """SHA-256 over what a stage uses: the model, the layers and `of`."""
        # A vector's repr does not show its floats.
        said = [(x.digest, x.when) if isinstance(x, Vector) else x for x in of]
        return hashlib.sha256(repr((self.many.fingerprint, self.layers, said)).encode()).hexdigest()

    def _kept(self, stage: str, find: Callable[[], Any], *of: object) -> Any:
        """What `find` returns, or returned in an earlier run. of: all that it uses, see `_key`."""
        path, key = self._cache / f"{stage}.json", self._key(*of)
        if path.exists():
            try:
                data = json.loads(path.read_text())
            except ValueError:  # it was being written
                data = {}
            if data.get("key") == key:
                return data["found"]
        found = find()
        write_whole(path, json.dumps({"key": key, "found": found}).encode())
        return found


def _load_rows(path: Path, key: str) -> dict[str, Floats] | None:
    """The rows that were kept under that key."""
    if not path.exists():
        return None
    with np.load(path) as data:
        if str(data["key"]) != key:
            return None
        return {name: data[name] for name in data.files if name != "key"}


def _names(entry: Trait | Group) -> list[str]:
    return list(entry.members) if isinstance(entry, Group) else [entry.name]


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of them, from all over."""
    return list(items[:: max(len(items) // count, 1)][:count])


def _kind(entry: Trait | Group) -> str:
    return "emotion" if isinstance(entry, Group) and entry.family == "emotions" else "trait"


def _is_purer(name: str, other: str, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether, for as much of a vector's own effect, that on `other` has fallen by DROP."""
    leak = (1 - DROP) * abs(before[other]) * after[name]
    return after[name] > 0 and abs(after[other]) * before[name] <= leak


def _lasting(before: Vector, purer: Vector) -> dict[str, MetaValue]:
    """What stays true of a vector once it is purified, and its new strength."""
    gone = ("bias", "center", "scale", "accuracy")
    kept = {k: v for k, v in before.meta.items() if k not in gone and not k.startswith("calibration.")}
    norms = np.asarray(before.meta["stream_norm"])
    lengths = np.linalg.norm(np.stack([purer.directions[n] for n in purer.layers]), axis=1)
    return {**kept, "strength": [float(s) for s in lengths / norms]}


def _lessons(entries: Sequence[Trait | Group], text: Callable[[str, str], Text]) -> Iterator[Lesson]:
    """The replies of the train split; both poles of a trait train one vector."""
    for entry in entries:
        if isinstance(entry, Group):
            for event in entry.of("train"):
                for name, reply in event.replies.items():
                    yield name, 1.0, text(event.text, reply)
        else:
            for pair in entry.of("train"):
                yield entry.name, 1.0, text(pair.ask, pair.high)
                yield entry.name, -1.0, text(pair.ask, pair.low)


def _samples(group: Group, events: Sequence[Event]) -> dict[str, list[Sample]]:
    """By member, its replies to the events that it replies to."""
    return {
        name: [Sample(event.text, event.replies[name]) for event in events if name in event.replies]
        for name in group.members
    }


def _poles_of(pairs: Sequence[Pair]) -> dict[str, list[Sample]]:
    return {
        "positive": [Sample(pair.ask, pair.high) for pair in pairs],
        "negative": [Sample(pair.ask, pair.low) for pair in pairs],
    }


def _accuracy(vector: Vector, test: Reading, positive: str) -> list[float]:
    """By layer, the share of new replies on the right side of the middle, both sides alike."""
    up = test.sets[positive].rows.astype(np.float64)
    down = np.concatenate([s.rows for name, s in test.sets.items() if name != positive]).astype(np.float64)
    rows = np.stack([vector.directions[layer] for layer in vector.layers]).astype(np.float64)
    read = [(states * rows).sum(axis=2) for states in (up, down)]
    # Where the middle lies among the new texts is told by their own means: the calibration texts are few.
    middle = (read[0].mean(axis=0) + read[1].mean(axis=0)) / 2
    return [float(a) for a in ((read[0] > middle).mean(axis=0) + (read[1] < middle).mean(axis=0)) / 2]


def _random_like(vector: Vector, seed: int) -> Vector:
    """Random directions, at each layer as long as the vector's."""
    random = np.random.default_rng(seed)
    rows = np.stack([vector.directions[layer] for layer in vector.layers])
    drawn = random.standard_normal(rows.shape)
    drawn *= np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(drawn, axis=1, keepdims=True)
    meta = {"when": vector.when}
    return Vector(f"random{seed}", vector.layers, drawn.astype(np.float32), vector.fingerprint, meta=meta)
