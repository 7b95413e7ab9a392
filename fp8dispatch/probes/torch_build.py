"""Which torch is installed and what it was built with, read without importing it.

Importing torch takes seconds. Its file ``version.py`` holds the local suffix that PyPI's metadata
leaves out and the versions of CUDA and ROCm; it is read as data, and no code of the package runs.
That the file can be read does not say that torch can be imported: only importing it does.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class TorchBuild:
    """A torch.

    Attributes:
        version: with its local suffix, ``"2.11.0+cu130"``; empty where it is not known.
        cuda: version of CUDA that it was built with, None for another build.
        hip: the same of ROCm.
        problem: why importing it must fail, else None.
    """

    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    problem: str | None = None

    def versions(self) -> dict[str, str]:
        """What `fp8dispatch.machine.Machine.versions` says of it."""
        stated = {"torch": self.version, "cuda": self.cuda, "hip": self.hip}
        return {name: text for name, text in stated.items() if text}


def read_torch_build() -> TorchBuild:
    """The torch that an import would find first."""
    try:
        spec = find_spec("torch")
    except Exception as error:  # noqa: BLE001  # other people's import hooks may raise anything
        return TorchBuild(problem=f"{type(error).__name__}: {error}")
    if spec is None:
        return TorchBuild(problem="it is not installed")
    folders = [str(folder) for folder in spec.submodule_search_locations or ()]
    where = spec.origin or ", ".join(folders)
    if spec.origin is None or not folders:
        return TorchBuild(problem=f"{where} is called torch and is no package")
    file = Path(folders[0], "version.py")
    try:
        stated = _texts(ast.parse(file.read_bytes()))
    except (OSError, SyntaxError, ValueError) as error:
        return TorchBuild(problem=f"its file {file} cannot be read ({error})")
    if "__version__" not in stated:
        return TorchBuild(problem=f"its file {file} states no version")
    return TorchBuild(stated["__version__"], stated.get("cuda"), stated.get("hip"))


def _texts(module: ast.Module) -> dict[str, str]:
    """The names of a module that stand for a text: ``name = "..."`` and ``name: type = "..."``."""
    found: dict[str, str] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        value = statement.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found.update((one.id, value.value) for one in targets if isinstance(one, ast.Name))
    return found
