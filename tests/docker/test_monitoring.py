"""docker/monitoring: rules, their tests, and a consistent dashboard."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from typing import Any

import pytest
import yaml
from programs import program
from wire import ROOT

MONITORING = ROOT / "docker" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboards/siglip-serve.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        [program("promtool"), *arguments],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if kind in rule]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_rules_and_configuration(arguments: tuple[str, ...]) -> None:
    assert "SUCCESS" in promtool(*arguments)


def test_every_alert_is_tested_to_fire_and_to_be_silent() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    names = {rule["alert"] for rule in rules("alert")}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_the_compared_measures_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    used = {name for rule in rules("alert") for name in re.findall(r"siglip_serve:\w+:\w+", rule["expr"])}
    assert used == recorded


def test_every_public_model_is_watched() -> None:
    public = {page.stem for page in (ROOT / "deployments").glob("*.md")} - {"siglip_text", "siglip_vision"}
    expressions = [rule["expr"] for rule in rules("record")]
    expressions += [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    lists = [
        set(names.split("|")) for text in expressions for names in re.findall(r'=~"(embed_image[^"]+)"', text)
    ]
    assert len(lists) >= 6
    for names in lists:
        # A fit may take seconds.
        assert names in (public, public - {"fit_teams"})


def test_panels_have_places_and_queries_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_grafana_finds_the_dashboard_and_its_data() -> None:
    folder = MONITORING / "grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    used = {
        target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
    }
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((folder / "dashboards/siglip-serve.yml").read_text(encoding="utf-8"))[
        "providers"
    ]
    compose = (ROOT / "docker/compose.yaml").read_text(encoding="utf-8")
    assert f"./monitoring/dashboards:{provider['options']['path']}:ro" in compose
    assert source["url"] == "http://prometheus:9090"
