"""A bad input as data: its change to a healthy input, the commands that meet it, and their expected answers."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, chdir, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

import dsv4_convert.golden as golden_package
from dsv4_convert.cli import app
from dsv4_convert.errors import Dsv4Error
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store import open_store, verify
from tests.checkpoint.hub_server import LoopbackHub

Words = tuple[str, ...]

#: The commands. Names in braces are attributes of :class:`Place`.
CONVERT: Words = ("convert", "hf-to-orbax", "{source}", "{dest}")
PLAN: Words = (*CONVERT, "--dry-run")
AGAINST: Words = ("verify", "{orbax}", "--against", "{source}")
RECORD: Words = ("golden", "record", "{source}", "--out", "{dest}", "--random", "3")
PARITY_SOURCE: Words = ("parity", "--source", "{source}", "--golden", "{golden}")
VERIFY: Words = ("verify", "{orbax}")
EXPORT: Words = ("convert", "orbax-to-hf", "{orbax}", "{dest}")
PARITY: Words = ("parity", "{orbax}", "--golden", "{golden}")
#: Everything that opens a published checkpoint.
READERS = (CONVERT, PLAN, AGAINST, RECORD, PARITY_SOURCE)

#: An access token, which nothing may ever print or write.
TOKEN = "hf_SecretSecretSecretSecret"

#: Two layers, both ways of routing, a stage after them; five shards, of which the second is layer 0.
SMALL = tiny_config(
    num_hidden_layers=2, num_hash_layers=1, compress_ratios=[4, 0, 0], n_routed_experts=3, vocab_size=32
)
SHARDS = tuple(f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6))
SHARD = SHARDS[1]


@dataclasses.dataclass
class Place:
    """A copy of everything healthy, for one case; each part is made when it is first asked for."""

    bench: Bench
    root: Path
    model: str
    #: Closed when the case is over.
    stack: ExitStack
    #: The Hub that the client of this process talks to, where a case has one.
    hub: LoopbackHub | None = None

    @cached_property
    def source(self) -> Path:
        """The published checkpoint."""
        shutil.copytree(self.bench.source(self.model), self.root / "source")
        return self.root / "source"

    @property
    def healthy(self) -> Path:
        """The published checkpoint as it was; not to be changed."""
        return self.bench.source(self.model)

    @cached_property
    def orbax(self) -> Path:
        """Its conversion. Files are hard links: only :func:`.edit.rewrite` may change them."""
        shutil.copytree(self.bench.orbax(self.model), self.root / "orbax", copy_function=os.link)
        return self.root / "orbax"

    @cached_property
    def golden(self) -> Path:
        """The committed golden of the model ``tiny``."""
        shutil.copytree(self.bench.golden, self.root / "golden")
        return self.root / "golden"

    @property
    def dest(self) -> Path:
        """Where a command writes to."""
        return self.root / "dest"

    @property
    def shard(self) -> Path:
        """The shard of layer 0."""
        return self.source / next(file.name for file in sorted(self.source.iterdir()) if "-00002-" in file.name)

    @property
    def shard_name(self) -> str:
        """Its name alone."""
        return self.shard.name

    @property
    def config(self) -> Path:
        """The source's config.json."""
        return self.source / "config.json"

    @property
    def index(self) -> Path:
        """The source's index."""
        return self.source / "model.safetensors.index.json"

    def words(self, words: Words) -> list[str]:
        """A command with the names in braces filled in."""
        return [re.sub(r"\{(\w+)\}", lambda name: str(getattr(self, name[1])), word) for word in words]


@dataclasses.dataclass
class Bench:
    """The healthy inputs, each made once; ``root`` is an empty folder."""

    root: Path

    def __post_init__(self) -> None:
        self._places = 0

    @property
    def golden(self) -> Path:
        """The committed golden."""
        return Path(golden_package.__file__).parent / "data" / "tiny"

    def source(self, model: str) -> Path:
        """A published checkpoint: ``small``, or ``tiny``, from which the committed golden was recorded."""
        folder = self.root / model
        if not folder.exists():
            write_checkpoint(folder, SMALL if model == "small" else tiny_config(), seed=0)
        return folder

    def orbax(self, model: str) -> Path:
        """Its conversion."""
        folder = self.root / f"{model}-orbax"
        if not folder.exists():
            outcome = invoke(["convert", "hf-to-orbax", str(self.source(model)), str(folder)])
            assert outcome.code == 0, outcome.text
        return folder

    def place(self, case: Case) -> Place:
        """A fresh copy for a case."""
        self._places += 1
        root = self.root / f"{case.id}-{self._places}"
        root.mkdir()
        return Place(self, root, case.model, ExitStack())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    code: int
    out: str
    err: str
    #: The traceback of what nobody caught; empty without one.
    crash: str

    @property
    def text(self) -> str:
        """Everything that it printed, each run of white space as one space."""
        return " ".join(f"{self.out}\n{self.err}\n{self.crash}".split())


def invoke(words: list[str]) -> Outcome:
    """Run a command in this process."""
    # The plan's measurement of a disk writes 64 MiB, which says nothing about an input.
    # Loggers of others keep the stderr of the command that imported them, which is closed when the next one runs.
    quiet = patch.object(logging, "raiseExceptions", False)
    with patch("dsv4_convert.convert.estimate._PROBE_BYTES", 1 << 16), quiet:
        result = CliRunner().invoke(app, words)
    crash = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        crash = "".join(traceback.format_exception(result.exception))
    return Outcome(result.exit_code, result.stdout, result.stderr, crash)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command that meets the input: its exit code, and what its answer has to hold, white space aside."""

    words: Words
    code: int
    says: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One input.

    Attributes:
        id: a key of the table :data:`.catalogue.IDS`.
        what: the input in words, unique within the id.
        edit: changes a healthy copy.
        steps: the commands, in order.
        after: further checks after all commands; raises AssertionError.
        during: a context in which the commands run, such as other permissions.
        model: the healthy checkpoint to copy.
        resumed: each command finds the files that a refused one left beside the destination.
        slow: it converts weights, compiles programs or waits, and another case of the same id is quicker.
    """

    id: str
    what: str
    steps: tuple[Step, ...]
    edit: Callable[[Place], object] = lambda place: None
    after: Callable[[Place], object] = lambda place: None
    during: Callable[[Place], AbstractContextManager[Any]] = lambda place: nullcontext()
    model: str = "small"
    resumed: bool = False
    slow: bool = False

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.id} {self.what}"

    @property
    def accepted(self) -> bool:
        """Whether the input is legal, if odd: every command takes it."""
        return all(step.code == 0 for step in self.steps)

    @property
    def first_step(self) -> Case:
        """The same input with its first command alone, where the others only have to say the same."""
        same = len({(step.code, step.says) for step in self.steps}) == 1
        return dataclasses.replace(self, steps=self.steps[:1]) if same else self


def refused(id: str, what: str, *says: str, by: tuple[Words, ...] = (CONVERT,), code: int = 3, **more: Any) -> Case:
    """A case that every one of some commands refuses in the same words."""
    return Case(id=id, what=what, steps=tuple(Step(words, code, says) for words in by), **more)


def accepted(id: str, what: str, *says: str, by: tuple[Words, ...] = (CONVERT,), **more: Any) -> Case:
    """A legal oddity."""
    return refused(id, what, *says, by=by, code=0, **more)


def examine(
    bench: Bench, case: Case, *, told: Callable[[Words, Outcome], object] = lambda words, outcome: None
) -> list[str]:
    """Plant a case, run its commands, and give everything that is not as it has to be; nothing if all is."""
    place = bench.place(case)
    problems: list[str] = []
    try:
        case.edit(place)
        for step in case.steps:
            words, before = place.words(step.words), _content(place.dest)
            with case.during(place):
                outcome = invoke(words)
            told(step.words, outcome)
            problems += [
                f"{' '.join(step.words)}: {problem}" for problem in _problems(case, place, step, outcome, before)
            ]
            for left in place.root.glob("dest?*") if not case.resumed else ():
                shutil.rmtree(left)  # or the next command would go on with it
        if not problems:
            case.after(place)
        told_to = [file for file in place.root.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
        problems += [f"the token is in {file}" for file in told_to]
    except AssertionError as error:
        problems.append(f"{error}" or "".join(traceback.format_exception(error)))
    finally:
        place.stack.close()
        shutil.rmtree(place.root, ignore_errors=True)
    return problems


def _problems(
    case: Case, place: Place, step: Step, outcome: Outcome, before: Mapping[str, bytes] | None
) -> Iterator[str]:
    if outcome.code != step.code or outcome.crash:
        yield f"exit code {outcome.code}, expected {step.code}: {outcome.text[-1500:]}"
        return
    if "Traceback" in outcome.text:
        yield f"a traceback: {outcome.text[-1500:]}"
    if TOKEN in f"{outcome.out}{outcome.err}{outcome.crash}":
        yield "the token is in what was printed"
    messages = len(re.findall(r"^error: ", outcome.err, re.MULTILINE))
    verdict = step.words[0] == "parity" and step.code == 1  # a report on stdout, which is data
    if messages != (0 if step.code == 0 or verdict else 1):
        yield f"{messages} messages begin with 'error:': {outcome.err[-1500:]}"
    for part in place.words(step.says):
        if " ".join(part.split()) not in outcome.text:
            yield f"does not say {part!r}: {outcome.text[-1500:]}"
    if step.code and step.words[0] != "download" and _content(place.dest) != before:
        yield f"something is at the destination after exit code {step.code}"
    if step.code:
        yield from _opened_as_complete(place)
    elif step.words == CONVERT and (found := verify(open_store(place.dest))):
        yield f"what was written does not verify: {found}"


def _opened_as_complete(place: Place) -> Iterator[str]:
    """Paths beside the destination that dsv4 or Orbax alone opens as a checkpoint."""
    for beside in place.root.glob("dest?*"):
        try:
            open_store(beside)
            yield f"{beside.name} is opened as complete"
        except Dsv4Error:
            pass
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]

        try:
            ocp.StandardCheckpointer().restore(beside)
            yield f"Orbax restores {beside.name}"
        except Exception:  # whatever it finds to complain about
            pass


def _content(path: Path) -> dict[str, bytes] | None:
    """The bytes of every file below a path, without following links; None if nothing is there."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink():
        return {"": os.readlink(path).encode()}
    if not path.is_dir():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@contextmanager
def as_nobody(place: Place) -> Iterator[None]:
    """Without the rights of root, where the tests have them; paths are then reached from the place."""
    with ExitStack() as stack:
        stack.enter_context(chdir(place.root))
        if os.geteuid() == 0:
            os.chmod(place.root, 0o755)
            # Import everything first: the user `nobody` may not be able to read the modules.
            invoke(["convert", "hf-to-orbax", str(place.healthy), str(place.root / "before"), "--dry-run"])
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        yield
