"""The Grafana dashboards can be provisioned anywhere and ask only for what the server exports."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from deploy import dashboard, exposition

GRAFANA = dashboard.ROOT / "deploy" / "grafana"


@pytest.fixture(scope="module", params=dashboard.ALL, ids=lambda file: file.stem)
def board(request: pytest.FixtureRequest) -> dict:
    return dashboard.load(request.param)


def test_every_query_names_series_that_the_server_exports(board: dict) -> None:
    known = exposition.series_names()
    unknown = {
        (query.panel, name)
        for query in dashboard.queries(board)
        for name in exposition.mentioned(query.expr) - known
    }
    assert not unknown


def test_every_series_of_the_server_is_on_a_dashboard() -> None:
    shown = set()
    for file in dashboard.ALL:
        for query in dashboard.queries(dashboard.load(file)):
            shown |= exposition.mentioned(query.expr)
    missing = {
        family
        for family, kind in (exposition.families() | exposition.gateway_families()).items()
        if not any(
            name == family or (kind == "histogram" and name.startswith(family)) for name in shown
        )
    }
    assert not missing


def test_panel_ids_are_unique(board: dict) -> None:
    ids = [panel["id"] for panel in dashboard.panels(board)]
    assert len(ids) == len(set(ids))


def test_panels_do_not_overlap_and_fit_the_grid(board: dict) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken.get((x, y))}"
                taken[x, y] = panel["title"]


def test_every_panel_says_what_it_shows_and_uses_the_datasource_variable(board: dict) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    for panel in dashboard.panels(board):
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)) > 0, panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]


def test_queries_use_only_variables_that_exist(board: dict) -> None:
    known = {variable["name"] for variable in board["templating"]["list"]}
    known |= {"__rate_interval", "__range"}
    for query in dashboard.queries(board):
        assert set(re.findall(r"\$\{?(\w+)", query.expr)) <= known, query.panel


def test_the_dashboard_carries_nothing_of_the_machine_it_was_made_on(board: dict) -> None:
    assert board.get("id") is None, "a database id of somebody's Grafana"
    text = json.dumps(board)
    assert not re.search(r"https?://|@|\b\d{1,3}(\.\d{1,3}){3}\b|localhost", text)
    assert "__inputs" not in board


def test_provisioning_points_at_the_dashboard_and_at_a_prometheus() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    providers = yaml.safe_load((GRAFANA / "provisioning/dashboards/loraplex.yml").read_text())
    (provider,) = providers["providers"]
    compose = yaml.safe_load((dashboard.ROOT / "deploy/compose.yaml").read_text())
    mounts = dict(
        volume.split(":")[:2]
        for volume in compose["services"]["grafana"]["volumes"]
        if volume[0] == "."
    )
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]


def test_dashboards_have_ids_of_their_own_and_none_is_left_out() -> None:
    files = sorted(dashboard.FOLDER.glob("*.json"))
    assert files == sorted(dashboard.ALL)
    uids = {dashboard.load(file)["uid"] for file in files}
    assert uids == {file.stem for file in files}
