"""Records as machines print them: logs, HTTP, diffs, settings, listings."""

from __future__ import annotations

import json

from .common import Dice, World
from .data_files import WORDS, clock
from .dates import MONTHS


def access_log(dice: Dice, world: World) -> str:
    """Make lines of a web server's access log."""
    year, month, day = world.date(dice)
    second = dice.between(0, 80000)
    out = []
    for _ in range(dice.between(5, 7)):
        second += dice.between(0, 40)
        good = dice.pick(world.goods).replace(" ", "-")
        path = dice.pick(
            (
                f"/item/{good}",
                f"/search?q={good}&page={dice.between(1, 9)}",
                f"/static/{dice.hex(6)}.{dice.pick(('css', 'js', 'png'))}",
                "/",
                f"/api/v{dice.between(1, 3)}/cart/{dice.between(100, 9999)}",
            )
        )
        verbs = ("GET", "POST", "DELETE") if "/api/" in path else ("GET", "GET", "HEAD")
        out.append(
            f"192.0.2.{dice.between(1, 254)} - {dice.pick(('-', 'guest', 'admin'))} "
            f"[{day:02d}/{MONTHS[month - 1][:3]}/{year}:{clock(second)} +0000] "
            f'"{dice.pick(verbs)} {path} HTTP/1.1" '
            f"{dice.pick((200, 200, 200, 304, 404, 500, 302))} "
            f"{dice.between(0, 48000)}"
        )
    return "\n".join(out)


def service_log(dice: Dice, world: World) -> str:
    """Make the log of a service with levels, fields and a failure."""
    service = dice.pick(world.services)
    date = world.iso_date(dice)
    milli = dice.between(0, 80_000_000)
    out = []

    def add(level: str, text: str) -> None:
        nonlocal milli
        milli += dice.between(2, 9000)
        stamp = f"{clock(milli // 1000)}.{milli % 1000:03d}"
        out.append(f"{date}T{stamp}Z {level:<5} {service}[{pid}] {text}")

    pid = dice.between(300, 32000)
    word, other, third = dice.some(WORDS, 3)
    add("INFO", f"starting, build {dice.hex(8)}, {dice.between(2, 32)} threads")
    add("DEBUG", f"{word} size={dice.between(8, 4096)} ttl={dice.between(10, 900)}s")
    for _ in range(dice.between(2, 3)):
        add(
            "INFO",
            f"{dice.pick(('loaded', 'flushed', 'merged', 'scanned'))} "
            f"{dice.between(1, 90000)} rows from {dice.pick(WORDS)} "
            f"in {dice.between(3, 2400)} ms",
        )
    add("WARN", f"{other} is {dice.between(81, 99)}% full, slowing down writers")
    add("ERROR", f"{third} {dice.between(1, 40)}: connection reset (attempt 1 of 3)")
    add("INFO", f"{third} recovered after {dice.between(100, 4000)} ms")
    add("INFO", f"shutdown requested by signal {dice.pick((2, 15))}, draining")
    return "\n".join(out)


def http_exchange(dice: Dice, world: World) -> str:
    """Make an HTTP request with its response."""
    good = dice.pick(world.goods)
    name = dice.pick(world.people)
    sent = {
        "item": good,
        "colour": dice.pick(world.colours),
        "count": dice.between(1, 12),
        "note": f"for {name}",
    }
    body = json.dumps(sent)
    status, answer = dice.pick(
        (
            ("201 Created", {"id": dice.between(1000, 99999), "state": "accepted"}),
            ("409 Conflict", {"error": "out_of_stock", "left": dice.between(0, 3)}),
            ("422 Unprocessable Content", {"error": "bad_count", "max": 10}),
            ("202 Accepted", {"job": dice.hex(10), "position": dice.between(1, 80)}),
        )
    )
    reply = json.dumps(answer, indent=2)
    service = dice.pick(world.services)
    return "\n".join(
        [
            f"POST /{service}/v{dice.between(1, 4)}/orders HTTP/1.1",
            f"Host: {dice.pick(world.colours)}.example.com",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"X-Request-Id: {dice.hex(16)}",
            "",
            body,
            "",
            f"HTTP/1.1 {status}",
            f"Server: {service}/{dice.between(1, 9)}.{dice.between(0, 40)}",
            f"Cache-Control: {dice.pick(('no-store', 'private', 'max-age=60'))}",
            f"Content-Length: {len(reply)}",
            "",
            reply,
        ]
    )


def diff(dice: Dice, world: World) -> str:
    """Make a unified diff of a settings file."""
    service = dice.pick(world.services)
    one, two, three = dice.some(WORDS, 3)
    start = dice.between(3, 200)
    old, new = dice.between(1, 60), dice.between(61, 600)
    return "\n".join(
        [
            f"diff --git a/etc/{service}.conf b/etc/{service}.conf",
            f"index {dice.hex(7)}..{dice.hex(7)} 100644",
            f"--- a/etc/{service}.conf",
            f"+++ b/etc/{service}.conf",
            f"@@ -{start},6 +{start},8 @@",
            f" [{one}]",
            f"-size = {old}",
            f"+size = {new}",
            f" owner = {dice.pick(world.people).lower()}",
            f" [{two}]",
            f"-mode = {dice.pick(('fast', 'safe'))}",
            f"+mode = {dice.pick(('adaptive', 'pinned'))}",
            f"+# raised after the outage in {dice.pick(world.places)}",
            f"+{three}_grace = {dice.between(5, 90)}s",
            f" path = /srv/{service}/{two}",
        ]
    )


def unit_file(dice: Dice, world: World) -> str:
    """Make a service definition in INI style."""
    service = dice.pick(world.services)
    after = dice.pick([name for name in world.services if name != service])
    word = dice.pick(WORDS)
    return "\n".join(
        [
            "[Unit]",
            f"Description=The {service} daemon ({dice.pick(world.places)})",
            f"After=network.target {after}.service",
            "",
            "[Service]",
            f"User={service}",
            f"Environment={word.upper()}_DIR=/var/lib/{service}/{word}",
            f"ExecStart=/usr/bin/{service}d --port {dice.between(1025, 9999)} --{word}s {dice.between(2, 96)}",
            f"Restart={dice.pick(('on-failure', 'always', 'no'))}",
            f"RestartSec={dice.between(1, 30)}",
            f"MemoryMax={dice.between(64, 900)}M",
            f"Nice={dice.between(-5, 15)}",
            "",
            "[Install]",
            f"WantedBy={dice.pick(('multi-user', 'default', 'graphical'))}.target",
        ]
    )


def listing_of_files(dice: Dice, world: World) -> str:
    """Make a directory listing with sizes and dates."""
    service = dice.pick(world.services)
    lines = [f"$ ls -l /srv/{service}"]
    sizes = []
    for word in dice.some(WORDS, dice.between(6, 8)):
        ending = dice.pick((".log", ".db", ".json", ".tmp", ".gz", ".lock"))
        sizes.append(dice.between(0, 9_000_000))
        mode = dice.pick(("-rw-r--r--", "-rw-------", "-rwxr-x---"))
        lines.append(
            f"{mode} 1 {service} staff {sizes[-1]:>8} {world.iso_date(dice)} "
            f"{clock(dice.between(0, 86399))[:5]} {word}{ending}"
        )
    lines += [f"$ du -sb /srv/{service}", f"{sum(sizes) + 4096}\t/srv/{service}"]
    return "\n".join(lines)
