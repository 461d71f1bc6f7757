"""The nftables rules of a fence: written from its plan, loaded in one transaction, read back and compared.

Three tables of the same name. ``bridge`` is the fence: between a clone's tap and its veth everything passes, between
them and anything else nothing does, the host included. ``inet`` and ``arp`` hold where the first cannot: when somebody
takes a tap out of its bridge, its frames would reach the host's own stack. ``inet`` also keeps the clone's packets out
of connection tracking where br_netfilter shows bridged packets to the host's firewall: they carry the addresses of
the original and would disturb its entries.

What comes from the clone's side is marked where it enters, before anything else is decided about it. The kernel keeps
a packet's mark while it bridges or routes it, so whoever meets the mark on any other link of the host has met a
packet of this clone, whatever addresses it bears (``vmsnap.network.ears`` listens for it).

Rules match links by name, so they hold before the taps exist and whatever bridge a link is put into (``meta ibrname``
is missing in some kernels). A drop is final in netfilter: no other table can overrule it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from vmsnap.errors import DeadlineError, PreconditionError, ToolError
from vmsnap.model.isolation import FencePlan, FencePort

FAMILIES = ("bridge", "inet", "arp")
_EARLIEST = -450  # before defragmentation (-400) and connection tracking (-200)
_MARKING = -500
_FILTER = -200  # of the bridge family: NF_BR_PRI_FILTER_BRIDGED
_COMMANDS_TIMEOUT = timedelta(seconds=10)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One base chain; its policy is ``accept``, because it sees the whole host's traffic."""

    family: str
    name: str
    hook: str
    priority: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule: links to match, a counter, a verdict. ``label`` is its comment and names its counter."""

    chain: Chain
    label: str
    verdict: str
    arrives_on: str | None = None
    leaves_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Count:
    """What a rule's counter says."""

    packets: int
    size_bytes: int


MARK = "mark"
"""The verdict of a rule that sets the plan's mark and lets the packet go on."""

TO_HOST = Chain(family="bridge", name="to_host", hook="input", priority=_FILTER)
ACROSS = Chain(family="bridge", name="across", hook="forward", priority=_FILTER)
FROM_HOST = Chain(family="bridge", name="from_host", hook="output", priority=_FILTER)
UNBRIDGED = Chain(family="inet", name="unbridged", hook="prerouting", priority=_EARLIEST)
UNBRIDGED_ARP = Chain(family="arp", name="unbridged", hook="input", priority=_EARLIEST)
MARKED = Chain(family="bridge", name="marked", hook="prerouting", priority=_MARKING)
UNBRIDGED_MARKED = Chain(family="inet", name="unbridged_marked", hook="prerouting", priority=_MARKING)
CHAINS = (TO_HOST, ACROSS, FROM_HOST, UNBRIDGED, UNBRIDGED_ARP, MARKED, UNBRIDGED_MARKED)


def to_host_label(link: str) -> str:
    """Return the label of the rule that drops what ``link`` sends to the host."""
    return f"{link} to host"


def passing_label(port: FencePort) -> str:
    """Return the label of the rule that lets a clone speak to our side of the fence."""
    return f"{port.tap} to {port.veth_host}"


def rules_of(plan: FencePlan) -> tuple[Rule, ...]:
    """Return all rules of a fence, in order."""
    return tuple(rule for port in plan.ports for rule in _rules_of_port(port))


def _rules_of_port(port: FencePort) -> tuple[Rule, ...]:
    ends = (port.tap, port.veth_host)
    passing = tuple(
        Rule(chain=ACROSS, label=f"{one} to {other}", arrives_on=one, leaves_by=other, verdict="accept")
        for one, other in (ends, ends[::-1])
    )
    dropping = tuple(
        rule
        for link in ends
        for rule in (
            Rule(chain=ACROSS, label=f"{link} to elsewhere", arrives_on=link, verdict="drop"),
            Rule(chain=ACROSS, label=f"elsewhere to {link}", leaves_by=link, verdict="drop"),
            Rule(chain=TO_HOST, label=to_host_label(link), arrives_on=link, verdict="drop"),
            Rule(chain=FROM_HOST, label=f"host to {link}", leaves_by=link, verdict="drop"),
            Rule(chain=UNBRIDGED, label=f"{link} out of its bridge", arrives_on=link, verdict="drop"),
            Rule(chain=UNBRIDGED_ARP, label=f"{link} ARP out of its bridge", arrives_on=link, verdict="drop"),
            Rule(chain=MARKED, label=f"{link} marked", arrives_on=link, verdict=MARK),
            Rule(chain=UNBRIDGED_MARKED, label=f"{link} marked out of its bridge", arrives_on=link, verdict=MARK),
        )
    )
    untracked = Rule(chain=UNBRIDGED, label=f"{port.bridge} untracked", arrives_on=port.bridge, verdict="notrack")
    return (*passing, *dropping, untracked)


def load(plan: FencePlan) -> None:
    """Load the fence's tables, all or nothing. Raises PreconditionError, also where a table exists already."""
    commands = [
        *({"create": {"table": _table(plan, family=family)}} for family in FAMILIES),
        *({"add": {"chain": _chain(plan, chain=chain)}} for chain in CHAINS),
        *({"add": {"rule": _rule(plan, rule=rule)}} for rule in rules_of(plan)),
    ]
    try:
        _nft("-j", "-f", "-", text=json.dumps({"nftables": commands}), timeout=_COMMANDS_TIMEOUT)
    except ToolError as exc:
        raise PreconditionError(
            f"cannot load the rules of the fence {plan.table}",
            details=exc.details,
            remedy="vmsnap has to run as root, with nftables 1.0 and a kernel with nf_tables for bridge, inet and arp",
        ) from exc


def deviations(plan: FencePlan) -> tuple[str, ...]:
    """Compare the tables in the kernel with the plan and return what differs. Raises ToolError."""
    found: list[str] = []
    loaded = _tables_loaded()
    for family in FAMILIES:
        if (family, plan.table) not in loaded:
            found.append(f"nft table {family} {plan.table} is missing")
            continue
        listed = _list(family, table=plan.table)
        chains = [_plain(item["chain"]) for item in listed if "chain" in item]
        rules = [_plain(item["rule"]) for item in listed if "rule" in item]
        others = [key for item in listed for key in item if key not in {"metainfo", "table", "chain", "rule"}]
        wanted_chains = [_chain(plan, chain=chain) for chain in CHAINS if chain.family == family]
        wanted_rules = [_plain(_rule(plan, rule=rule)) for rule in rules_of(plan) if rule.chain.family == family]
        found.extend(_compare(f"nft chains of {family} {plan.table}", wanted=wanted_chains, seen=chains))
        for chain in wanted_chains:
            found.extend(
                _compare(
                    f"nft rules of {family} {plan.table} {chain['name']}",
                    wanted=[rule for rule in wanted_rules if rule["chain"] == chain["name"]],
                    seen=[rule for rule in rules if rule["chain"] == chain["name"]],
                )
            )
        found.extend(f"nft table {family} {plan.table} has a foreign {key}" for key in others)
        flags = [item["table"]["flags"] for item in listed if "table" in item and "flags" in item["table"]]
        found.extend(f"nft table {family} {plan.table} has the flags {flag}" for flag in flags)
    return tuple(found)


def _compare(what: str, *, wanted: list[dict[str, Any]], seen: list[dict[str, Any]]) -> Iterable[str]:
    missing = [item for item in wanted if item not in seen]
    foreign = [item for item in seen if item not in wanted]
    if missing:
        yield f"{what}: missing {_names(missing)}"
    if foreign:
        yield f"{what}: not ours {_names(foreign)}"
    if not missing and not foreign and wanted != seen:
        yield f"{what}: in another order"


def _names(items: list[dict[str, Any]]) -> str:
    return "; ".join(str(item.get("comment") or item.get("name") or json.dumps(item)) for item in items)


def counts(plan: FencePlan, *, families: Iterable[str] = FAMILIES) -> Mapping[str, Count]:
    """Return the counters of all rules by their labels. Raises ToolError where the tables are gone."""
    found = {}
    for family in families:
        for item in _list(family, table=plan.table):
            for part in item.get("rule", {}).get("expr", ()):
                if isinstance(part.get("counter"), dict):
                    counter = part["counter"]
                    label = item["rule"].get("comment", "")
                    found[label] = Count(packets=counter["packets"], size_bytes=counter["bytes"])
    return found


def table_names() -> tuple[str, ...]:
    """Return the names of all tables of the families that a fence uses."""
    return tuple(sorted({name for _, name in _tables_loaded()}))


def remove(table: str, *, timeout: timedelta) -> None:
    """Remove the tables of that name, or return where there are none. Raises ToolError, DeadlineError."""
    loaded = _tables_loaded()
    commands = [
        {"delete": {"table": {"family": family, "name": table}}} for family in FAMILIES if (family, table) in loaded
    ]
    if commands:
        _nft("-j", "-f", "-", text=json.dumps({"nftables": commands}), timeout=timeout)


def _tables_loaded() -> frozenset[tuple[str, str]]:
    # As text: nft 1.0.6 writes broken JSON for any table with flags, and firewalls have such tables.
    lines = _nft("list", "tables", timeout=_COMMANDS_TIMEOUT).splitlines()
    tables = [tuple(line.split()[1:3]) for line in lines if line.startswith("table ")]
    return frozenset((family, name) for family, name in tables if family in FAMILIES)


def chains() -> str:
    """Return the chains of all tables, as nft writes them. Raises ToolError, DeadlineError."""
    return _nft("list", "chains", timeout=_COMMANDS_TIMEOUT)


def _list(family: str, *, table: str) -> list[dict[str, Any]]:
    return _parsed(_nft("-j", "list", "table", family, table, timeout=_COMMANDS_TIMEOUT))


def _parsed(output: str) -> list[dict[str, Any]]:
    try:
        items = json.loads(output)["nftables"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ToolError("nft gave an answer that is not its JSON format", details=output[:500]) from exc
    return list(items)


def _table(plan: FencePlan, *, family: str) -> dict[str, Any]:
    return {"family": family, "name": plan.table}


def _chain(plan: FencePlan, *, chain: Chain) -> dict[str, Any]:
    return {
        "family": chain.family,
        "table": plan.table,
        "name": chain.name,
        "type": "filter",
        "hook": chain.hook,
        "prio": chain.priority,
        "policy": "accept",
    }


def _rule(plan: FencePlan, *, rule: Rule) -> dict[str, Any]:
    matches = [
        {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": link}}
        for key, link in (("iifname", rule.arrives_on), ("oifname", rule.leaves_by))
        if link is not None
    ]
    return {
        "family": rule.chain.family,
        "table": plan.table,
        "chain": rule.chain.name,
        "comment": rule.label,
        "expr": [*matches, {"counter": {"packets": 0, "bytes": 0}}, _statement(plan, verdict=rule.verdict)],
    }


def _statement(plan: FencePlan, *, verdict: str) -> dict[str, Any]:
    if verdict == MARK:
        return {"mangle": {"key": {"meta": {"key": "mark"}}, "value": plan.mark}}
    return {verdict: None}


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return a listed chain or rule without what the kernel adds: handles and the state of counters."""
    plain = {key: value for key, value in item.items() if key != "handle"}
    if "expr" in plain:
        plain["expr"] = [{"counter": None} if "counter" in part else part for part in plain["expr"]]
    return plain


def _nft(*arguments: str, timeout: timedelta, text: str | None = None) -> str:
    command = ["nft", *arguments]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout.total_seconds(), check=False
        )
    except FileNotFoundError as exc:
        raise PreconditionError("the program 'nft' is not installed", remedy="install the package nftables") from exc
    except subprocess.TimeoutExpired as exc:
        raise DeadlineError(f"nft did not end within {timeout.total_seconds():.0f} s", remedy="try again") from exc
    if done.returncode != 0:
        raise ToolError(
            f"'{' '.join(command)}' failed with exit status {done.returncode}",
            details=done.stderr.strip()[:2000],
            remedy="read nft's message; it needs root and a kernel with nf_tables",
        )
    return done.stdout
