"""The file of principals: what it says, and every fault of it by file, principal and field."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_adapters.store import LabelSelector
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.identity.principals_file import KnownPrincipals, read_principals
from loraplex_server.access.principals import Principal, PrincipalLimits
from loraplex_server.access.roles import ALL_ROLES, Role


def read(folder: Path, text: str | bytes) -> KnownPrincipals:
    file = folder / "principals.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_principals(file)


def faults(folder: Path, text: str | bytes) -> list[str]:
    """What is wrong with a file; its name comes first in the message."""
    with pytest.raises(Refusal) as refused:
        read(folder, text)
    assert refused.value.reason is Reason.CONFIG_INVALID
    assert refused.value.message.startswith(f"{folder / 'principals.toml'}: ")
    for message in refused.value.messages:
        assert message in refused.value.message
    return refused.value.messages


def test_every_key_of_the_file_is_what_the_principal_has(tmp_path: Path) -> None:
    known = read(
        tmp_path,
        """
        [principals.search]
        roles = ["infer", "read", "register", "infer"]
        adapters = "team=search, !retired"
        base = false
        name_prefix = "search-"
        imports = "search//data/./x/"
        own_copies = true
        cache_group = "both"
        certificates = ["search.example", "CN with spaces"]
        subjects = ["auth0|7", "é"]
        [principals.search.limits]
        requests_per_minute = 60
        tokens_per_minute = 100_000
        concurrent_requests = 1
        queue_share = 1
        adapters = 20
        store_bytes = "10GiB"
        max_priority = -3
        """,
    )
    search = Principal(
        name="search",
        roles=frozenset({Role.INFER, Role.READ, Role.REGISTER}),
        adapters=LabelSelector.parse("team=search,!retired"),
        base=False,
        name_prefix="search-",
        imports="search/data/x",
        own_copies=True,
        cache_group="both",
        limits=PrincipalLimits(60, 100_000, 1, 1.0, 20, 10 << 30, -3),
    )
    assert known.by_name == {"search": search}
    assert known.certificates == {"search.example": search, "CN with spaces": search}
    assert known.subjects == {"auth0|7": search, "é": search}


def test_what_is_not_said_is_allowed_to_nobody_but_the_base(tmp_path: Path) -> None:
    known = read(tmp_path, "[principals.a]\nroles = []")
    assert known.by_name == {"a": Principal(name="a", cache_group="a")}
    assert not known.by_name["a"].sees({})
    assert known.by_name["a"].imports is None


@pytest.mark.parametrize("selector", ["", "*"])
def test_all_adapters_are_selected_by_nothing_and_by_a_star(tmp_path: Path, selector: str) -> None:
    principal = read(tmp_path, f'[principals.a]\nroles = []\nadapters = "{selector}"').by_name["a"]
    assert principal.sees_all
    assert principal.sees({"any": "thing"})


@pytest.mark.parametrize("imports", ["", ".", "./"])
def test_the_import_root_itself_may_be_given(tmp_path: Path, imports: str) -> None:
    known = read(tmp_path, f'[principals.a]\nroles = []\nimports = "{imports}"')
    assert known.by_name["a"].imports == ""


@pytest.mark.parametrize("name", ["a", "0", "a-b_c.d", "x" * 63])
def test_good_names_of_principals(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, f'[principals."{name}"]\nroles = []').by_name.keys() == {name}


@pytest.mark.parametrize("name", ["", "A", "-a", "_other", ".a", "a b", "é", "a\\n", "x" * 64])
def test_bad_names_of_principals(tmp_path: Path, name: str) -> None:
    (fault,) = faults(tmp_path, f'[principals."{name}"]\nroles = []')
    assert "the name of a principal has 1 to 63 characters" in fault


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('roles = ["root"]', "roles.0: "),
        ('roles = "infer"', "roles: "),
        ("roles = [1]", "roles.0: "),
        ("role = []", "role: there is no such key"),
        ('adapters = "team="', None),
        ('adapters = "Team=a"', "adapters: is no label selector: a label key has"),
        ('adapters = "team=a,"', "adapters: is no label selector: "),
        ('adapters = ["team=a"]', "adapters: "),
        ("base = 1", "base: "),
        ('base = "no"', "base: "),
        ('name_prefix = "-a"', "name_prefix: "),
        ('name_prefix = "a/"', "name_prefix: "),
        ('name_prefix = "A"', "name_prefix: "),
        (f'name_prefix = "{"a" * 63}"', "name_prefix: "),
        ('imports = "/etc"', "imports: "),
        ('imports = ".."', "imports: "),
        ('imports = "a/../../b"', "imports: "),
        ('imports = "a\\u0000b"', "imports: "),
        ("imports = false", "imports: "),
        ('cache_group = "_"', "cache_group: "),
        ('certificates = "a"', "certificates: "),
        ('certificates = ["a", ""]', "certificates.1: "),
        ('subjects = ["a\\nb"]', "subjects.0: "),
        (f'subjects = ["{"a" * 1025}"]', "subjects.0: "),
        ("limits = 1", "limits: "),
        ("limits.requests = 1", "limits.requests: there is no such key"),
        ("limits.requests_per_minute = 0", "limits.requests_per_minute: "),
        ("limits.requests_per_minute = 1.5", "limits.requests_per_minute: "),
        ("limits.requests_per_minute = true", "limits.requests_per_minute: "),
        ('limits.requests_per_minute = "1"', "limits.requests_per_minute: "),
        (f"limits.tokens_per_minute = {10**30}", "limits.tokens_per_minute: "),
        ("limits.tokens_per_minute = -1", "limits.tokens_per_minute: "),
        ("limits.concurrent_requests = 0", "limits.concurrent_requests: "),
        ("limits.queue_share = 0", "limits.queue_share: "),
        ("limits.queue_share = 1.01", "limits.queue_share: "),
        ("limits.queue_share = nan", "limits.queue_share: "),
        ("limits.queue_share = inf", "limits.queue_share: "),
        ("limits.adapters = 0", "limits.adapters: "),
        ("limits.store_bytes = 0", "limits.store_bytes: "),
        ('limits.store_bytes = "lots"', "limits.store_bytes: "),
        ("limits.store_bytes = -5", "limits.store_bytes: "),
        ("limits.max_priority = 11", "limits.max_priority: "),
    ],
    ids=str,
)
def test_a_fault_is_named_with_its_principal_and_field(
    tmp_path: Path, line: str, told: str | None
) -> None:
    roles = "" if line.startswith("roles") else "roles = []\n"
    text = f"[principals.good]\nroles = []\n[principals.bad]\n{roles}{line}"
    if told is None:
        assert read(tmp_path, text)
        return
    (fault,) = faults(tmp_path, text)
    assert fault.startswith(f"principals.bad.{told}")


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        """
        version = 1
        [principals.a]
        roles = ["infer", "boss"]
        limits.adapters = 0
        colour = "red"
        [principals.b]
        certificates = ["x"]
        [principals.C]
        roles = []
        [principals.d]
        roles = ["train"]
        adapters = "team=d"
        certificates = ["y"]
        [principals.e]
        roles = []
        certificates = ["y"]
        """,
    )
    starts = [
        "version: there is no such key",
        "principals.a.roles.1: ",
        "principals.a.limits.adapters: ",
        "principals.a.colour: ",
        "principals.b.roles: is missing",
        "principals.'C': ",
        "principals.e.certificates: 'y' belongs to d already",
        "principals.d.name_prefix: is missing",
    ]
    assert len(found) == len(starts)
    for start in starts:
        assert any(fault.startswith(start) for fault in found), start


@pytest.mark.parametrize("key", ["certificates", "subjects"])
def test_one_credential_cannot_be_two_principals(tmp_path: Path, key: str) -> None:
    two = f'[principals.a]\nroles=[]\n{key}=["x", "x"]\n[principals.b]\nroles=[]\n{key}=["y", "x"]'
    (fault,) = faults(tmp_path, two)
    assert fault == f"principals.b.{key}: 'x' belongs to a already"


def test_a_certificate_and_a_subject_of_one_name_may_belong_to_different_principals(
    tmp_path: Path,
) -> None:
    text = '[principals.a]\nroles=[]\nsubjects=["x"]\n[principals.b]\nroles=[]\ncertificates=["x"]'
    known = read(tmp_path, text)
    assert known.subjects["x"].name == "a"
    assert known.certificates["x"].name == "b"


@pytest.mark.parametrize("role", ["register", "train"])
def test_who_makes_adapters_sees_all_of_them_or_has_names_of_its_own(
    tmp_path: Path, role: str
) -> None:
    head = f'[principals.a]\nroles = ["{role}"]\n'
    read(tmp_path, f'{head}adapters = "*"')
    read(tmp_path, f'{head}adapters = "team=a"\nname_prefix = "a-"')
    (fault,) = faults(tmp_path, f'{head}adapters = "team=a"')
    assert fault.startswith("principals.a.name_prefix: is missing")
    (fault,) = faults(tmp_path, f'{head}name_prefix = "a-"')
    assert fault.startswith("principals.a.adapters: is missing")
    read(tmp_path, '[principals.a]\nroles = ["infer", "read", "admin"]\nadapters = "team=a"')


def test_no_prefix_of_a_name_belongs_to_two_principals_with_different_adapters(
    tmp_path: Path,
) -> None:
    def two(first: str, second: str, selectors: tuple[str, str] = ("team=a", "team=b")) -> str:
        return "\n".join(
            f'[principals.{name}]\nroles = ["register"]\nadapters = "{selector}"\n'
            f'name_prefix = "{prefix}"'
            for name, prefix, selector in zip("ab", (first, second), selectors, strict=True)
        )

    read(tmp_path, two("a-", "b-"))
    read(tmp_path, two("ab", "ac"))
    for first, second in (("a-", "a-"), ("a-", "a-b-"), ("a-b-", "a-")):
        (fault,) = faults(tmp_path, two(first, second))
        assert "which is the name_prefix of" in fault
        read(tmp_path, two(first, second, ("team=a", " team = a ")))
        read(tmp_path, two(first, second, ("team=a", "*")))


PREFIXES = ["", "a", "a-", "ab", "b"]
SELECTORS = [None, "*", "t=a", "t=b"]
principals = st.lists(
    st.tuples(
        st.sampled_from(PREFIXES), st.sampled_from(SELECTORS), st.sets(st.sampled_from(list(Role)))
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(principals)
def test_in_a_file_that_is_accepted_no_name_can_be_made_by_two_who_do_not_see_the_same(
    tmp_path: Path, drawn: list[tuple[str, str | None, set[Role]]]
) -> None:
    text = ""
    for index, (prefix, selector, roles) in enumerate(drawn):
        text += f"[principals.p{index}]\nroles = {[str(role) for role in roles]}\n"
        text += f'name_prefix = "{prefix}"\n'
        text += "" if selector is None else f'adapters = "{selector}"\n'
    makers = [each for each in drawn if each[2] & {Role.REGISTER, Role.TRAIN} and each[1] != "*"]
    names = ["a", "a-", "ab", "b", "c", "a-x", "abx"]
    safe = all(selector and prefix for prefix, selector, _ in makers) and not any(
        one[1] != other[1] and any(n.startswith(one[0]) and n.startswith(other[0]) for n in names)
        for one, other in combinations(makers, 2)
    )
    try:
        read(tmp_path, text)
    except Refusal:
        assert not safe
    else:
        assert safe


@pytest.mark.parametrize(
    "content",
    ["", "# nothing", "principals = 1", "[principals]", "[[principals]]\na = 1", "[principals",
     "[principals.a]\nroles=[]\n[principals.a]\nroles=[]", "a = " + "[" * 10_000,
     f"[principals.a]\nroles = []\nlimits.adapters = {'9' * 10_000}", b"\xff\xfe", b"\x00",
     "[principals]\na = 1"],
)  # fmt: skip
def test_what_is_no_file_of_principals_is_refused(tmp_path: Path, content: str | bytes) -> None:
    assert faults(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(Refusal, match="cannot be read") as refused:
            read_principals(path)
        assert refused.value.reason is Reason.CONFIG_INVALID


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text(alphabet='[]{}"=.,\nprincalsoe1 '))
def test_no_bytes_raise_anything_but_the_typed_error(tmp_path: Path, content: bytes | str) -> None:
    assert faults(tmp_path, content)


def test_a_thousand_principals_are_read(tmp_path: Path) -> None:
    text = "".join(
        f'[principals.p{i}]\nroles = ["register"]\nadapters = "t=p{i}"\nname_prefix = "p{i}-"\n'
        for i in range(1000)
    )
    known = read(tmp_path, text)
    assert len(known.by_name) == 1000
    assert Role.REGISTER in ALL_ROLES & known.by_name["p999"].roles
