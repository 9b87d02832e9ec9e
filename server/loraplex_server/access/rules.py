"""What a principal may name, label and import.

Each rule looks at the principal and at the request alone. So a refusal is the same whether or not
anything of that name exists.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.access.principals import Principal


def require_base(principal: Principal) -> None:
    """Raises Refusal(PERMISSION_DENIED) if the base model is not for the principal."""
    if not principal.base:
        raise _denied("the base model without an adapter is not available to this caller")


def require_name(principal: Principal, name: str) -> None:
    """Raises Refusal(PERMISSION_DENIED) if the principal may not change a name or an alias."""
    if not name.startswith(principal.name_prefix):
        text = f"names and aliases of this caller begin with {principal.name_prefix!r}"
        raise _denied(text, name)


def labels_of_new(principal: Principal, given: Mapping[str, str]) -> dict[str, str]:
    """The labels of a version that the principal registers: those given, and those that it must
    have so that it exists for the principal.

    Raises Refusal(PERMISSION_DENIED) if it would not exist for the principal with the given ones.
    """
    if principal.sees_all or principal.adapters is None:
        labels = dict(given)
    else:
        labels = {**principal.adapters.fixed, **given}
    if not principal.sees(labels):
        raise _denied("an adapter with these labels would not be visible to this caller")
    return labels


def require_labelling(
    principal: Principal, given: Mapping[str, str], removed: Collection[str]
) -> None:
    """Raises Refusal(PERMISSION_DENIED) if a change of labels could decide who sees a version."""
    if principal.sees_all or principal.adapters is None:
        return
    fixed = principal.adapters.fixed
    changed = {key for key, value in given.items() if fixed.get(key) != value}
    if held := principal.adapters.keys & changed.union(removed):
        raise _denied(f"this caller cannot change the labels {', '.join(sorted(held))}")


def import_folder(principal: Principal, import_root: Path) -> Path:
    """The directory that the principal's paths are relative to.

    Raises Refusal(PERMISSION_DENIED) if it may not name files of the server.
    """
    if principal.imports is None:
        raise _denied("this caller cannot name files of the server; it can send them")
    return import_root / principal.imports


def cache_salt(principal: Principal, salt: str) -> str:
    """The salt under which a request shares keys and values, from the salt that it gives.

    Different groups of principals never have the same one, whatever they send: the group's length
    says where it ends.
    """
    group = principal.cache_group or principal.name
    return f"{len(group)}:{group}{salt}" if group else salt


def _denied(text: str, subject: str = "") -> Refusal:
    return Refusal(Reason.PERMISSION_DENIED, text, subject)
