"""Pages that are made, not written: those of files at the top of the repository, and the reference by the wings."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOP = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
TITLES = {
    "alignment": "Alignments",
    "core": "Environment",
    "distillation": "Jobs",
    "evaluation": "Evaluation",
    "models": "Students",
    "ops": "Losses",
    "reference": "Formulas",
}


def api_pages() -> dict[str, str]:
    """Markdown by address: a page for each wing with what the package shows of it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import vocabdistil

    pages: dict[str, list[str]] = {}
    for name in vocabdistil.__all__:
        home = vocabdistil._HOMES.get(name) or vocabdistil._MODULES[name]
        paths = [f"vocabdistil.{home}.{name}"] if name in vocabdistil._HOMES else module_paths(f"vocabdistil.{home}")
        pages.setdefault(home.split(".")[0], []).extend(f"::: {path}\n" for path in paths)
    return {
        f"api/{wing}.md": f"# {TITLES[wing]}\n\n" + "\n".join(parts) for wing, parts in pages.items()
    }


def module_paths(module: str) -> list[str]:
    """A module by itself; of a package what it takes from its modules, each from where it is."""
    place = ROOT / module.replace(".", "/")
    if not place.is_dir():
        return [module]
    tree = ast.parse((place / "__init__.py").read_text(encoding="utf-8"))
    taken = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__")
    return [f"{node.module}.{alias.name}" for node in taken for alias in node.names]


def top_page(text: str, url: str) -> str:
    """A file of the repository as a page: its links lead to pages, or else to the files."""
    pages = {file: page for page, file in TOP.items()}

    def target(found: re.Match[str]) -> str:
        path = found[1]
        if "://" in path or path.startswith("#"):
            return found[0]
        page = path.removeprefix("docs/") if path.startswith("docs/") else pages.get(path)
        return f"]({page or f'{url}/blob/main/{path}'})"

    return re.sub(r"\]\(([^)\s]+)\)", target, text)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    made = api_pages()
    for page, name in TOP.items():
        made[page] = top_page((ROOT / name).read_text(encoding="utf-8"), config.repo_url)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things as Sphinx does; here the name alone is shown."""
    return re.sub(r":(?:func|class|meth|mod|data|attr|exc):<code>~?", "<code>", html)
