"""Generated parts of pages: tables from the code, code beside formulas, formulas as MathML.

A page asks for them in comments, so the plain file stays readable:

* ``<!-- table: names -->`` becomes a table made from the code's tables (:data:`TABLES`).
* ``<!-- code: dsv4_convert/model/norm.py rms_scale rms_norm -->`` becomes the source of these functions.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_convert.spec.names import NameTable

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

#: Prefixes of the names of layers and stages.
_LAYER, _STAGE = "layers.N.", "mtp.N."
#: Longer code is folded.
_OPEN_LINES = 45
_COMMENT = re.compile(r"^<!-- (table|code): (.+?) -->$", re.MULTILINE)
#: A role of Sphinx, as docstrings use them, after Markdown made its text code.
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(<code[^>]*>)~?")
_OPTION = re.compile(r"(?<![\w`-])--[a-z][\w-]*")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook: put in the tables and the code that a page asks for."""
    return filled(markdown)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs' hook: formulas become MathML, which browsers draw without a script; roles lose their names."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        block = match[1] == "div"
        # The converter knows LaTeX's `aligned` only as `align*`.
        text = html.unescape(match[2]).strip().replace("{aligned}", "{align*}")
        drawn = convert(text, display="block" if block else "inline")
        return f'<div class="formula">{drawn}</div>' if block else drawn

    return _ROLE.sub(r"\1", _FORMULA.sub(formula, content))


def filled(markdown: str) -> str:
    """A page with its comments replaced. Raises :class:`ValueError` or :class:`KeyError` for unknown tables or code."""

    def fill(match: re.Match[str]) -> str:
        kind, what = match[1], match[2].split()
        return TABLES[what[0]](*what[1:]) if kind == "table" else "\n\n".join(code(what[0], *what[1:]))

    return _COMMENT.sub(fill, markdown)


def code(file: str, *names: str) -> Iterator[str]:
    """Functions, methods (``Class.method``) or the head of classes of a file, each as a block of its own.

    Raises:
        ValueError: the file has no such name.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    for name in names:
        node = _find(ast.parse(text), name.split("."))
        if node is None:
            raise ValueError(f"{file}: no {name}")
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef) and ast.get_docstring(node):
            last = node.body[0].end_lineno or last  # what it is; its methods are asked for by name
        yield _block(f"{file}: {name}", inspect.cleandoc("\n" + "\n".join(lines[first - 1 : last])))


def _find(node: ast.AST, path: Sequence[str]) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == path[0]:
            return child if len(path) == 1 else _find(child, path[1:])
    return None


def _block(title: str, text: str) -> str:
    if text.count("\n") < _OPEN_LINES:
        return f'```py title="{title}"\n{text}\n```'
    indented = "\n".join(f"    {line}" if line else "" for line in text.splitlines())
    return f'??? quote "{title}, {text.count(chr(10)) + 1} lines"\n\n    ```py\n{indented}\n    ```'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; cells have no lines and no bars of their own."""
    every = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in every)


def _code(text: str | None) -> str:
    return "" if not text else f"`{text}`"


def _spelled(template: str) -> str:
    """``layers.{}.ffn.experts.{}.w1`` with letters for its numbers."""
    return template.replace("{}", "N", 1).replace("{}", "E")


def _table_of(model: str) -> NameTable:
    """The names of the architecture that ``dsv4 names --model`` has under this name."""
    from dsv4_convert.spec.architectures import ARCHITECTURES

    return next(each.names for each in ARCHITECTURES if each.title.lower() == f"deepseek-{model}")


def _names(model: str) -> str:
    from dsv4_convert.spec.names import ALWAYS, Rule, Section, Transform

    of = _table_of(model).of

    def rows(rules: Iterable[Rule], below: str) -> Iterator[list[str]]:
        for rule in rules:
            names = [_code(_spelled(name).removeprefix(below)) for name in (rule.published, rule.path)]
            shape = " × ".join(rule.shape.split())
            when = rule.when.label if rule.when is not ALWAYS else ""
            kind = f"{rule.kind.value}{', stacked' if rule.per_expert else ''}"
            transform = "" if rule.transform is Transform.NONE else rule.transform.value
            yield [*names, shape, kind, transform, *([when] if below else [])]

    header = ["published tensor", "parameter", "shape", "kind", "transform"]
    whole = table(header, rows(of(Section.MODEL), ""))
    layer = table([*header, "only in"], rows(of(Section.LAYERS), _LAYER))
    stage = table([*header, "only in"], rows(of(Section.STAGES), _STAGE))
    text = (
        f"### The model\n\n{whole}\n\n### Every layer\n\nBelow `{_LAYER}`:\n\n{layer}\n\n"
        f"### The draft stages\n\nBelow `{_STAGE}`:\n\n{stage}"
    )
    seeing = of(Section.VISION)
    return f"{text}\n\n### The vision encoder\n\n{table(header, rows(seeing, ''))}" if seeing else text


def _dialects() -> str:
    from dsv4_convert.spec.names import Dialect
    from dsv4_convert.spec.v4.names import RULES

    def rows() -> Iterator[list[str]]:
        for rule in RULES:
            names = [_code(_spelled(rule.template(dialect))) for dialect in Dialect]
            if rule.fused:
                names[-1] += f" or {_code(_spelled(rule.fused))}"
            yield names

    return table([dialect.value for dialect in Dialect], rows())


def _sizes(model: str) -> str:
    from dsv4_convert.spec.config import Config

    sizes = _table_of(model).sizes
    if model == "v4.1":
        known = sizes(Config.from_file(_config("DeepSeek-V4.1-Flash.from_third_party_test")), 14)
        return table(["symbol", "V4.1-Flash, layer 14"], [[symbol, str(value)] for symbol, value in known.items()])
    models = {name: Config.from_file(_config(name)) for name in ("DeepSeek-V4-Flash-0731", "DeepSeek-V4-Pro")}
    csa = [sizes(config, 2) for config in models.values()]
    hca = [sizes(config, 3) for config in models.values()]

    def value(in_csa: int | None, in_hca: int | None) -> str:
        return f"{in_csa or ''}" if in_csa == in_hca else f"{in_csa} in CSA, {in_hca} in HCA layers"

    rows = [
        [symbol, *map(value, [each.get(symbol) for each in csa], [each.get(symbol) for each in hca])]
        for symbol in csa[0]
    ]
    return table(["symbol", "V4-Flash-0731", "V4-Pro"], rows)


def _kinds() -> str:
    from dsv4_convert.spec.names import Kind

    rows = [[kind.value, "by `--dtype`" if kind.follows_dtype else "as published"] for kind in Kind]
    return table(["kind", "stored dtype", "is"], [[*row, _meaning(Kind, row[0].upper())] for row in rows])


def _meaning(owner: type, member: str) -> str:
    """The ``#:`` comment above a member of a class, as far as it goes."""
    lines = inspect.getsource(owner).splitlines()
    at = next(number for number, line in enumerate(lines) if line.strip().startswith(f"{member} ="))
    said: list[str] = []
    while lines[at - 1 - len(said)].strip().startswith("#:"):
        said.append(lines[at - 1 - len(said)].strip().removeprefix("#:").strip())
    return " ".join(reversed(said)).replace("``", "`")


def _taps(which: str) -> str:
    from dsv4_convert.spec.tap import AFTER, BEFORE, LAYER, Values
    from dsv4_convert.spec.v4 import taps
    from dsv4_convert.spec.v4.taps import READS_STREAMS, STAGE, STATE, TAPS
    from dsv4_convert.spec.v41.taps import TAPS as TAPS_OF_V41

    model, stage = (BEFORE, AFTER), (STAGE, READS_STREAMS)
    drafts = (READS_STREAMS, taps.DSPARK, taps.DSPARK_FIRST, taps.DSPARK_LATER, taps.DSPARK_LAST)
    chosen = {
        "layer": [tap for tap in TAPS if tap.where not in (*model, *stage, *drafts)],
        "stage": [tap for tap in TAPS if tap.where in stage],
        "draft": [tap for tap in TAPS if tap.where in drafts],
        "model": [tap for tap in TAPS if tap.where in model],
        "state": list(STATE),
        "v4.1": [tap for tap in TAPS_OF_V41 if tap not in TAPS],
    }[which]
    rows = [
        [
            _code(tap.name),
            _code(" ".join(tap.shape.split())),
            tap.meaning + (" (a choice)" if tap.values is Values.CHOICE else ""),
            "" if tap.where in (LAYER, STAGE) or which == "stage" else tap.where.label,
            ", ".join(map(_code, tap.weights)),
        ]
        for tap in chosen
    ]
    return table(["tap", "shape", "meaning", "where", "parameters of its operation"], rows)


def _configs() -> str:
    import json

    from dsv4_convert.spec.v4.config import V4Config

    raw = [json.loads(_config(name).read_text("utf-8")) for name in ("DeepSeek-V4-Flash", "DeepSeek-V4-Pro")]
    fields = [field.name for field in dataclasses.fields(V4Config)]
    rows = [[_code(name), *(_shown(document[name]) for document in raw)] for name in fields if name in raw[0]]
    return table(["field", "V4-Flash", "V4-Pro"], rows)


def _schedule() -> str:
    from dsv4_convert.spec.config import Config
    from dsv4_convert.spec.v4.config import as_v4
    from dsv4_convert.spec.v4.kinds import AttentionKind

    rows = []
    for name in ("DeepSeek-V4-Flash", "DeepSeek-V4-Pro"):
        config = as_v4(Config.from_file(_config(name)))
        layers = {kind: [layer for layer, own in enumerate(config.attention) if own is kind] for kind in AttentionKind}
        hashed = [layer for layer, own in enumerate(config.hash_routed) if own]
        rows.append([name, str(config.num_hidden_layers), *(_ranges(layers[kind]) for kind in AttentionKind)])
        rows[-1] += [_ranges(hashed), str(config.num_mtp_stages)]
    return table(["model", "layers", "window only", "CSA", "HCA", "hash-routed", "mtp stages"], rows)


def _ranges(numbers: Sequence[int]) -> str:
    """``0, 1`` or ``2, 4, … 42 (21)``."""
    if len(numbers) <= 5:
        return ", ".join(map(str, numbers)) or "none"
    return f"{numbers[0]}, {numbers[1]}, {numbers[2]}, … {numbers[-1]} ({len(numbers)})"


def _shown(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _config(name: str) -> Path:
    return ROOT / "tests" / "data" / "configs" / f"{name}.json"


def _limits() -> str:
    from dsv4_convert.parity.tolerances import LIMITS, Limits

    rows = [
        [field.name, *(f"{getattr(limits, field.name):g}" for limits in LIMITS.values())]
        for field in dataclasses.fields(Limits)
    ]
    return table(["noise floors that pass", "float32", "bfloat16", "release numerics"], rows)


#: Exit codes that belong to no error of ours.
_ENDS = [
    ["70", "A bug in dsv4: stderr has the traceback, and says how to report it."],
    ["130", "Interrupted. A conversion, download or recording goes on with the same command."],
]


def _exit_codes() -> str:
    from dsv4_convert import errors

    rows = [["0", "fine"]]
    for error in (errors.CheckFailed, errors.UsageError, errors.BadInput, errors.ResourceError):
        said = " ".join((error.__doc__ or "").split())
        rows.append([str(error.exit_code), said.removesuffix(f" Exit code {error.exit_code}.")])
    return table(["code", "meaning"], [*rows, *_ENDS])


def _commands() -> str:
    """Every command with its arguments and options, from the command line itself."""
    import typer

    from dsv4_convert.cli import app

    def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from leaves(inner, (*path, name))
        if not hasattr(command, "commands"):
            yield " ".join(path), command

    parts = []
    for path, command in leaves(typer.main.get_command(app), ("dsv4",)):
        rows = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            argument = parameter.param_type_name == "argument"
            metavar = "" if argument or getattr(parameter, "is_flag", False) else (parameter.metavar or "")
            label = (parameter.name or "").upper() if argument else ", ".join(parameter.opts)
            rows.append(
                [_code(f"{label} {metavar}".strip()), (getattr(parameter, "help", "") or "").replace("\n", " ")]
            )
        said = inspect.cleandoc(command.callback.__doc__ or "").replace("\\[", "[")  # as rich shows it
        said = re.sub(r"^(?!Example:).+$", lambda line: _OPTION.sub(r"`\g<0>`", line[0]), said, flags=re.MULTILINE)
        said = re.sub(r"^Example: (.+)$", r"```text\n\1\n```", said, flags=re.MULTILINE)
        parts.append(
            f"## {path} {{ #{path.replace(' ', '-')} }}\n\n{said}\n\n{table(['argument or option', ''], rows)}"
        )
    return "\n\n".join(parts)


#: The tables that a page can ask for.
TABLES: dict[str, Callable[..., str]] = {
    "commands": _commands,
    "configs": _configs,
    "dialects": _dialects,
    "exit-codes": _exit_codes,
    "kinds": _kinds,
    "limits": _limits,
    "names": _names,
    "schedule": _schedule,
    "sizes": _sizes,
    "taps": _taps,
}
