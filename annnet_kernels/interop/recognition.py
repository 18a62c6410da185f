"""Which modules are asymmetric non-local blocks, and whether their code is known to compute what was published.

A block is recognised by its structure, since people paste these classes into their own repositories. Structure does
not show what ``forward`` computes: only where the code of every class in the block is one that was published does
nothing need comparing.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import nn

from ..blocks.collapse import Parts
from ..blocks.normalization import FUSABLE_NORMS
from ..reference.blocks import PlainAFNB, PlainAPNB
from .dialects import BLOCKS, BlockNames

PUBLISHED_CODE = {
    "mendelxu": {
        "584486085a8f7c62",  # AFNB
        "32bae297c6074d47",  # APNB
        "38e6acfb1910d1ab",  # the stage of AFNB
        "6c805c31798269a1",  # the stage of APNB
        "9bc98e98c8bda80b",  # PSPModule
    },
    "mmseg": {
        "0dfa147ff0559869",  # AFNB, 0.11 to 1.2
        "c03246ad115f2aba",  # APNB
        "1d7c9e4ade3663a8",  # SelfAttentionBlock
        "1e6d73fd3cda335f",  # PPMConcat
        "b3fe2d2a3260d472",  # ConvModule, mmcv 2.0
        "e50d416d850dfbc6",  # ConvModule, mmcv 2.1 and 2.2
    },
    "simple": {
        "31a0122016a82ec0",  # AFNPBlock
        "1a7f71d2355176e8",  # APNBBlock
        "79ed1739e413130a",  # PPMModule
    },
}
"""Fingerprints of every published ``forward`` inside a block that is not PyTorch's own, by dialect."""

PUBLISHED_HEADS = {"199fbae558812890"}
"""Of ``ANNHead.forward``, mmsegmentation 0.11 to 1.2."""


def names_of(module: nn.Module) -> BlockNames | None:
    """What the parts of ``module`` are called, if it looks like a block of some dialect."""
    return next((names for names in BLOCKS if names.pools and names.matches(module)), None)


def is_published(block: nn.Module, names: BlockNames, parts: Parts) -> bool:
    """Whether the block surely computes what the collapse does: known code, ordinary parts, and nothing beside them."""
    if type(block) in (PlainAFNB, PlainAPNB):
        return True
    projections = [module for role in (parts.key, parts.query) for module in role]
    plain = (parts.value, parts.out, parts.join, *projections, *parts.tail, *parts.pools)
    known = {id(m) for m in (block, *plain, *parts.containers)}
    known |= {id(m) for name, m in block.named_modules() if name in ("stages", *names.unused)}
    return (
        all(id(module) in known and is_published_code(type(module), names.dialect) for module in block.modules())
        and all(type(role.norm) in FUSABLE_NORMS and type(role.activation) is nn.ReLU for role in parts[:2])
        and all(type(module) in (*FUSABLE_NORMS, nn.ReLU, nn.Dropout2d) for module in parts.tail)
        and _width(block, names) == parts.query.conv.out_channels
        and (parts.join is not None or not names.bottleneck)
    )


def _width(block: nn.Module, names: BlockNames) -> object:
    owner, _, attribute = names.width.rpartition(".")
    return getattr(block.get_submodule(owner), attribute, None)


def is_published_code(cls: type[nn.Module], dialect: str) -> bool:
    """Whether the forward of a class is PyTorch's own or one that a dialect's code base published."""
    if cls.__call__ is not nn.Module.__call__:
        return False
    if cls.forward.__module__.startswith("torch.nn.modules."):
        return cls.__module__.startswith("torch.nn.modules.") or cls.forward is nn.Module.forward
    return fingerprint(cls.forward) in PUBLISHED_CODE[dialect]


def fingerprint(function: Callable[..., Any]) -> str | None:
    """A hash of what a function's code does, whatever its layout, comments, docstring and annotations.

    Taken from the source, since bytecode differs between versions of Python; None where the source is not there, is
    not what was compiled, or reads names that are not PyTorch's.
    """
    try:
        lines, first = inspect.findsource(function)
        module = ast.parse("".join(lines))
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    definition = next((n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.lineno == first + 1), None)
    if definition is None or function.__closure__:  # what is decorated does not begin at its definition
        return None
    if not (_is_compiled_from(function.__code__, module) and _reads_only_pytorch(function, definition)):
        return None
    return hashlib.sha256(_canonical(definition).encode()).hexdigest()[:16]


_DROPPED_FIELDS = ("annotation", "returns", "type_comment", "type_params", "kind")


def _canonical(node: object) -> str:
    """A syntax tree as text that every version of Python writes alike: empty fields and docstrings are left out."""
    if isinstance(node, list):
        return f"[{','.join(_canonical(item) for item in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    kept = (f"{k}={_canonical(v)}" for k, v in fields.items() if k not in _DROPPED_FIELDS and v not in (None, []))
    return f"{type(node).__name__}({','.join(kept)})"


def _is_compiled_from(code: CodeType, module: ast.Module) -> bool:
    """Whether ``module`` compiles to ``code``: a file may have been edited after it was imported."""
    compiled = [compile(module, "<published>", "exec", dont_inherit=True)]
    for found in compiled:  # grows while it is walked
        if found.co_firstlineno == code.co_firstlineno and _same(found, code):
            return True
        compiled += [constant for constant in found.co_consts if isinstance(constant, CodeType)]
    return False


def _same(one: CodeType, other: CodeType) -> bool:
    if len(one.co_consts) != len(other.co_consts) or any(
        getattr(one, field) != getattr(other, field) for field in ("co_code", "co_names", "co_varnames", "co_freevars")
    ):
        return False
    return all(
        _same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else type(a) is type(b) and a == b
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


_HARMLESS = (torch, nn, nn.functional, partial)
"""What the global names of a published forward stand for."""


def _reads_only_pytorch(function: Callable[..., Any], definition: ast.FunctionDef) -> bool:
    """Whether the function's global names are PyTorch's modules or builtins: a helper's code is not in its source."""
    local = function.__code__.co_varnames + function.__code__.co_cellvars
    nodes = (node for statement in definition.body for node in ast.walk(statement))
    names = {node.id for node in nodes if isinstance(node, ast.Name)} - set(local)
    return all(
        any(function.__globals__[name] is known for known in _HARMLESS) for name in names & set(function.__globals__)
    )
