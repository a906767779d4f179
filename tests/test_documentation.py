"""README and docs name what there is: files, headings, commands, options, policies, parts and inputs."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Final

import pytest
import typer
from typer.main import get_command

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.caching.profile import Quantity
from adacorr_deploy.cli import bench, build, calibrate, run, serve, validate
from adacorr_deploy.core.prompts import text_encoder_spec
from adacorr_deploy.core.specs import (
    ConditionSpec,
    DecoderSpec,
    DType,
    PartSpec,
    PromptSpec,
    decode_spec,
    request_tensors,
)
from adacorr_deploy.exporters.contracts import Contracts
from adacorr_deploy.plugins import service_part_specs
from tests.models import model_spec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "adacorr_deploy" / "docs"
DEMO: Final = ROOT / "adacorr_deploy" / "demo"
PAGES: Final = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DEMO.glob("*.md"))]
SOURCES: Final = ("adacorr_deploy", "engines", "exporters", "plugins", "tests", "tools")
APPS: Final[Mapping[str, typer.Typer]] = {
    "adacorr-bench": bench.app,
    "adacorr-build": build.app,
    "adacorr-calibrate": calibrate.app,
    "adacorr-run": run.app,
    "adacorr-serve": serve.app,
    "adacorr-validate": validate.app,
}
POLICY_OPTIONS: Final = ("policy", "policies", "exact", "balanced", "fast")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command that stands in an indented block, without comments."""
    block = "\n".join(line for line in text_of(page).splitlines() if line.startswith("    "))
    for line in block.replace("\\\n", " ").splitlines():
        if re.match(r" +(adacorr-|python |bash |pip |docker )", line):
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            yield words


def code_spans(page: Path) -> list[str]:
    """Return what stands in backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", "\n".join(line for line in text.splitlines() if not line.startswith("    ")))


def words_in_code(page: Path) -> Iterator[list[str]]:
    yield from command_lines(page)
    yield from (words for span in code_spans(page) if (words := span.split()))


# --- Links, files, extras ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the headings as GitHub's links name them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.is_file(), link
            assert not anchor or anchor in anchors(file), link


@cache
def names_of_sources() -> frozenset[str]:
    files = chain.from_iterable((ROOT / folder).rglob("*") for folder in SOURCES)
    return frozenset(file.name for file in files)


@every_page
def test_source_files_that_are_named_exist(page: Path) -> None:
    """By their path in the repository, in the package or beside the page; by name alone, anywhere in the sources."""
    folders = (ROOT, ROOT / "adacorr_deploy", page.parent)
    for word in chain.from_iterable(words_in_code(page)):
        path = word.removeprefix("models/") if word.startswith("models/") else word  # of a repository of adacorr-serve
        if re.fullmatch(r"[\w./-]+\.(py|sh|cu|cuh)|(tests|tools|caching|quality|exporters|runtime)/[\w./-]+", path):
            known = any((folder / path).exists() for folder in folders)
            assert known or ("/" not in path and path in names_of_sources()), word


@every_page
def test_extras_are_the_packages(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"(?:'\.|adacorr-deploy)\[([\w,]+)\]", text_of(page)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), extras


@every_page
def test_names_that_are_imported_exist(page: Path) -> None:
    for module, names in re.findall(r"^ +from (adacorr_deploy\S*) import (.+)$", text_of(page), re.MULTILINE):
        assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(",")), module


# --- Commands ----------------------------------------------------------------------------------------------------


def check_command(words: Sequence[str]) -> None:
    """Parse a line as its command does, and read the policies in it; nothing is run."""
    context = get_command(APPS[words[0]]).make_context(words[0], list(words[1:]))
    given = (context.params.get(name) for name in POLICY_OPTIONS)
    for policy in chain.from_iterable(str(value).split(",") for value in given if value is not None):
        if not policy.endswith((".json", ".toml")):
            policy_named(policy)


@every_page
def test_command_lines_are_what_the_commands_take(page: Path) -> None:
    for words in command_lines(page):
        if words[0] in APPS and "…" not in " ".join(words):
            check_command(words)


@pytest.mark.parametrize("name", APPS)
def test_the_examples_of_help_are_what_the_commands_take(name: str) -> None:
    lines = [line for line in (get_command(APPS[name]).epilog or "").splitlines() if line.startswith("adacorr-")]
    assert len(lines) >= 3
    for line in lines:
        check_command(shlex.split(line))


@cache
def options_of_commands() -> Mapping[str, frozenset[str]]:
    return {
        name: frozenset(chain.from_iterable([*each.opts, *each.secondary_opts] for each in get_command(app).params))
        for name, app in APPS.items()
    }


@cache
def options_of_scripts() -> frozenset[str]:
    sources = chain((ROOT / "tools").rglob("*.py"), (ROOT / "adacorr_deploy" / "serving" / "templates").glob("*.py"))
    return frozenset(chain.from_iterable(options_of_script(source) for source in sources))


def options_of_script(source: Path) -> list[str]:
    return re.findall(r'"(--?[a-z][a-z-]*)"', source.read_text(encoding="utf-8"))


@every_page
def test_options_that_are_named_exist(page: Path) -> None:
    everywhere = frozenset({"--help"}).union(options_of_scripts(), *options_of_commands().values())
    for words in words_in_code(page):
        known = everywhere
        if words[0] in APPS:
            known = options_of_commands()[words[0]] | {"--help"}
        elif any((ROOT / word).is_file() for word in words[:2]):
            known = frozenset(options_of_script(next(ROOT / word for word in words[:2] if (ROOT / word).is_file())))
        elif words[0] in {"pip", "docker"}:
            continue
        assert {word for word in words if re.fullmatch(r"--[a-z][a-z-]*|-o", word)} <= known, words


# --- Parts and inputs --------------------------------------------------------------------------------------------


def first_table(page: Path, *, after: str) -> list[list[str]]:
    """Return the cells of the rows of the first table after a heading or a sentence."""
    table = re.search(r"(^\|.*\n)+", text_of(page).partition(after)[2], re.MULTILINE)
    assert table is not None, after
    return [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in table[0].splitlines()[2:]]


def tensor_names(cell: str) -> list[str]:
    """Return the names in a cell such as `tokens, step (1) i64, …: what it is`."""
    parts = [part.split() for part in re.sub(r"\([^()]*\)", "", cell.partition(":")[0]).split(",")]
    return [words[0] for words in parts if words and words[0] != "…"]


def test_the_table_of_parts_has_their_tensors_in_order() -> None:
    model = model_spec(latent_shape=(4, 3, 8, 8), patch=(1, 2, 2))
    decoder = DecoderSpec(precision=DType.FLOAT32, tile=(8, 8), overlap=2, scale=8, channels=3, vae_sha256="0" * 64)
    contracts = Contracts(model)
    specs: dict[str, PartSpec] = {
        **service_part_specs(model),
        "embed": contracts.embed(),
        "condition": contracts.condition(("timesteps", "labels")),
        "block_00": contracts.block_part(0),
        "head": contracts.head(),
        "text_encoder": text_encoder_spec(PromptSpec(tokens=5, width=12)),
        "decode": decode_spec(model, decoder),
    }
    for part, inputs, outputs in first_table(DOCS / "bundle.md", after="## Parts and their tensors"):
        name = re.sub(r"_T$", "_2", part.split("`")[1])
        spec = specs.pop(name)
        assert tensor_names(inputs) == [tensor.name for tensor in spec.inputs], name
        assert tensor_names(outputs) == [tensor.name for tensor in spec.outputs], name
    assert all(re.search(r"_[13]$", name) for name in specs), specs.keys()


def test_the_table_of_inputs_has_all_that_the_runtime_knows_of_a_request() -> None:
    conditions = ConditionSpec(num_classes=10, prompt=PromptSpec(tokens=5, width=12), frame_rate=True)
    model = replace(model_spec(latent_shape=(4, 3, 8, 8), patch=(1, 2, 2)), conditions=conditions)
    rows = first_table(DOCS / "families.md", after="**Inputs by name.**")
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == request_tensors(model).keys()


def test_the_table_of_profiles_has_every_quantity() -> None:
    rows = first_table(DOCS / "method.md", after="## Profiles")
    assert [row[0] for row in rows] == [f"`{quantity.value}`" for quantity in Quantity]
