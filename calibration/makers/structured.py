"""Structured text: JSON, YAML, CSV, tables, logs, XML, TOML, HTTP and others."""

from __future__ import annotations

import json

from .common import Dice, Recipe, World, cents

WORDS = (
    "retry",
    "cache",
    "queue",
    "batch",
    "session",
    "worker",
    "buffer",
    "shard",
    "token",
    "replica",
    "bucket",
    "stream",
)

MONTHS = (
    "Jan",
    "Feb",
    "Mar",
    "Apr",
    "May",
    "Jun",
    "Jul",
    "Aug",
    "Sep",
    "Oct",
    "Nov",
    "Dec",
)


def clock(seconds: int) -> str:
    """Write a second of the day as HH:MM:SS."""
    return f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def order_json(dice: Dice, world: World) -> str:
    """Make an order of a shop with lines, totals and an address."""
    lines = []
    total = 0
    for good in dice.some(world.goods, dice.between(2, 3)):
        quantity, price = dice.between(1, 6), dice.between(299, 8999)
        total += quantity * price
        lines.append(
            {
                "sku": f"{good[:2].upper()}-{dice.between(1000, 9999)}",
                "title": good,
                "quantity": quantity,
                "unit_price": cents(price),
                "gift": dice.chance(25),
            }
        )
    person = dice.pick(world.people)
    record = {
        "order": dice.between(100000, 999999),
        "placed": f"{world.iso_date(dice)}T{clock(dice.between(0, 86399))}Z",
        "status": dice.pick(("open", "packed", "shipped", "returned")),
        "customer": {
            "name": person,
            "mail": f"{person.lower()}@example.com",
            "since": dice.between(*world.years) - 4,
            "city": dice.pick(world.places),
        },
        "lines": lines,
        "shipping": {"method": dice.pick(("post", "courier", "pickup")), "fee": None},
        "total": cents(total),
    }
    return json.dumps(record, indent=dice.pick((2, 4)))


def events_jsonl(dice: Dice, world: World) -> str:
    """Make a stream of compact JSON events."""
    second = dice.between(0, 80000)
    out = []
    for number in range(dice.between(7, 10)):
        second += dice.between(1, 90)
        kind = dice.pick(("view", "click", "search", "add", "remove", "login", "error"))
        event: dict[str, object] = {"n": number, "t": clock(second), "kind": kind}
        if kind in ("view", "add", "remove", "click"):
            event["item"] = dice.pick(world.goods)
        elif kind == "search":
            event |= {"q": dice.pick(world.colours) + " " + dice.pick(world.goods)}
            event |= {"hits": dice.between(0, 60)}
        elif kind == "error":
            event |= {"code": dice.pick((400, 404, 409, 429, 500, 503))}
        else:
            event |= {"user": dice.pick(world.people).lower(), "ok": dice.chance(80)}
        out.append(json.dumps(event, separators=(",", ":")))
    return "\n".join(out)


def service_yaml(dice: Dice, world: World) -> str:
    """Make a deployment description in YAML."""
    first, second = dice.some(world.services, 2)
    port = dice.between(3000, 9000)
    return "\n".join(
        [
            f"# {first} and its companion {second}",
            "version: 3",
            "services:",
            f"  {first}:",
            f"    image: registry.example.com/{first}:{dice.between(1, 9)}.{dice.between(0, 20)}.{dice.between(0, 9)}",
            f"    replicas: {dice.between(1, 8)}",
            "    ports:",
            f'      - "{port}:{port + dice.between(1, 99)}"',
            "    environment:",
            f"      {first.upper()}_MODE: {dice.pick(('strict', 'lenient', 'batch'))}",
            f"      {dice.pick(WORDS).upper()}_LIMIT: {dice.between(16, 512)}",
            f'      GREETING: "hello from {dice.pick(world.places)}"',
            "    healthcheck:",
            f"      path: /{dice.pick(('healthz', 'ready', 'ping'))}",
            f"      interval: {dice.between(5, 60)}s",
            f"    depends_on: [{second}]",
            f"  {second}:",
            f"    build: ./{second}",
            f"    memory: {dice.pick((256, 384, 512, 768))}Mi",
            "    volumes:",
            f"      - type: {dice.pick(('bind', 'volume'))}",
            f"        source: ./data/{second}",
            f"        target: /var/lib/{second}",
            f"        read_only: {dice.pick(('true', 'false'))}",
            "    command: |",
            f"      {second} --{dice.pick(WORDS)}-size {dice.between(2, 64)} \\",
            f"        --log-level {dice.pick(('info', 'debug', 'warn'))}",
        ]
    )


def pipeline_yaml(dice: Dice, world: World) -> str:
    """Make a build pipeline in YAML."""
    service = dice.pick(world.services)
    jobs = dice.some(("lint", "unit", "package", "docs", "bench", "deploy"), 3)
    tools = dice.shuffled(("make", "cargo run --bin", "npm run", "python -m", "just"))
    lines = [
        f"name: {service}-pipeline",
        "on:",
        f"  push: {{branches: [main, release/{dice.between(1, 20)}.x]}}",
        f'  schedule: [{{cron: "{dice.between(0, 59)} {dice.between(0, 23)} * * {dice.between(0, 6)}"}}]',
        "jobs:",
    ]
    for position, job in enumerate(jobs):
        lines += [f"  {job}:", f"    timeout-minutes: {dice.between(5, 45)}"]
        if position:
            lines.append(f"    needs: {jobs[position - 1]}")
        lines += ["    steps:", "      - uses: checkout"]
        lines.append(f"      - run: {tools[position]} {job}")
        if dice.chance(60):
            lines += [
                f"      - name: keep the {dice.pick(WORDS)} report",
                f"        if: {dice.pick(('always()', 'failure()', 'success()'))}",
                f"        run: tar czf {service}-{job}.tar.gz out/{job}",
            ]
    return "\n".join(lines)


def sensor_csv(dice: Dice, world: World) -> str:
    """Make readings of a weather station as CSV."""
    date = world.iso_date(dice)
    temperature, pressure = dice.between(-50, 240), dice.between(9900, 10300)
    lines = ["time,station,temp_c,humidity,pressure_hpa,wind_ms,note"]
    station = dice.pick(world.places)
    for hour in range(dice.between(0, 8), 20, 2):
        temperature += dice.between(-9, 15)
        pressure += dice.between(-8, 8)
        note = dice.pick(("", "", "", "light rain", '"gusts, short"', "recalibrated"))
        lines.append(
            f"{date} {hour:02d}:00,{station},{temperature / 10:.1f},"
            f"{dice.between(31, 97)},{pressure / 10:.1f},{dice.between(0, 140) / 10},"
            f"{note}"
        )
    return "\n".join(lines)


def sales_table(dice: Dice, world: World) -> str:
    """Make a Markdown report with a table of sales and its sums."""
    goods = dice.some(world.goods, dice.between(4, 5))
    year = dice.between(*world.years)
    place = dice.pick(world.places)
    lines = [
        dice.pick(
            (
                f"## Sales in {place}, {year}",
                f"### Quarterly units, {place} shop ({year})",
                f"# {year} results for {place}",
            )
        ),
        "",
        "| Product | Q1 | Q2 | Q3 | Q4 | Year |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    sums = [0] * 4
    best = ("", 0)
    for good in goods:
        units = [dice.between(12, 480) for _ in range(4)]
        sums = [a + b for a, b in zip(sums, units, strict=True)]
        best = max(best, (good, sum(units)), key=lambda pair: pair[1])
        cells = " | ".join(map(str, units))
        lines.append(f"| {good.capitalize()} | {cells} | {sum(units)} |")
    lines.append(f"| **All** | {' | '.join(map(str, sums))} | {sum(sums)} |")
    quarter = sums.index(max(sums)) + 1
    lines += [
        "",
        f"The strongest quarter was Q{quarter} with {max(sums)} units. Best seller: "
        f"{best[0]} ({best[1]} units, {best[1] / sum(sums):.1%} of the total).",
    ]
    return "\n".join(lines)


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
            f"[{day:02d}/{MONTHS[month - 1]}/{year}:{clock(second)} +0000] "
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


def catalog_xml(dice: Dice, world: World) -> str:
    """Make a small catalogue in XML."""
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<catalog season="{dice.pick(("spring", "summer", "autumn", "winter"))}" year="{dice.between(*world.years)}">',
        f"  <!-- revised for {dice.pick(world.places)} -->",
    ]
    for good in dice.some(world.goods, 3):
        lines += [
            f'  <item id="i{dice.between(100, 999)}" colour="{dice.pick(world.colours)}">',
            f"    <name>{good.title()}</name>",
            f'    <price currency="{dice.pick(("EUR", "USD", "GBP", "CHF"))}">'
            f"{cents(dice.between(150, 20000))}</price>",
        ]
        if dice.chance(50):
            lines.append(f'    <weight unit="g">{dice.between(80, 5200)}</weight>')
        if dice.chance(50):
            lines.append(f"    <stock>{dice.between(0, 300)}</stock>")
        lines.append("  </item>")
    return "\n".join([*lines, "</catalog>"])


def project_toml(dice: Dice, world: World) -> str:
    """Make a project file in TOML."""
    service = dice.pick(world.services)
    words = dice.some(WORDS, 4)
    return "\n".join(
        [
            "[project]",
            f'name = "{service}-tools"',
            f'version = "{dice.between(0, 4)}.{dice.between(0, 30)}.{dice.between(0, 9)}"',
            f'description = "Command line helpers for the {service} service"',
            f'authors = [{{ name = "{dice.pick(world.people)}" }}]',
            f'keywords = ["{words[0]}", "{words[1]}"]',
            "",
            "[limits]",
            f"{words[2]}_max = {dice.between(1, 99) * 100}",
            f"timeout = {dice.between(1, 300) / 10}",
            f"enabled = {dice.pick(('true', 'false'))}",
            f"window = [{', '.join(str(dice.between(1, 500)) for _ in range(4))}]",
            "",
            f"[[{words[3]}]]",
            f'host = "{dice.pick(world.colours)}.example.com"',
            f"port = {dice.between(1024, 65535)}",
            f"started = {world.iso_date(dice)}T{clock(dice.between(0, 86399))}Z",
            "",
            f"[[{words[3]}]]",
            f'host = "10.{dice.between(0, 255)}.{dice.between(0, 255)}.7"',
            f"port = 0x{dice.hex(4)}",
            f'tags = {{ zone = "{dice.hex(1)}", rank = {dice.between(1, 50)} }}',
        ]
    )


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


def geojson(dice: Dice, world: World) -> str:
    """Make a feature collection of places with coordinates."""
    features = []
    for place in dice.some(world.places, 3):
        point = [dice.between(-1790, 1790) / 10, dice.between(-850, 850) / 10]
        features.append(
            {
                "type": "Feature",
                "properties": {
                    "name": place,
                    dice.pick(("people", "height_m", "opened")): dice.between(90, 3999),
                },
                "geometry": {"type": "Point", "coordinates": point},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}, indent=1)


def query_result(dice: Dice, world: World) -> str:
    """Make a query with its result in a box of ASCII lines."""
    place = dice.pick(world.places)
    rows = [("id", "name", "joined", "hours", "rate")]
    for person in dice.some(world.people, dice.between(4, 6)):
        rows.append(
            (
                str(dice.between(10, 999)),
                person,
                world.iso_date(dice),
                str(dice.between(4, 160)),
                cents(dice.between(1200, 5600)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    bar = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    order = dice.pick(("hours DESC", "name", "joined", "rate DESC"))
    keys = {
        "hours DESC": lambda line: -int(line.split("|")[4]),
        "name": lambda line: line.split("|")[2],
        "joined": lambda line: line.split("|")[3],
        "rate DESC": lambda line: -float(line.split("|")[5]),
    }
    body = sorted(table[1:], key=keys[order])
    return "\n".join(
        [
            "db> SELECT id, name, joined, hours, rate",
            f"  -> FROM staff WHERE site = '{place}' ORDER BY {order};",
            bar,
            table[0],
            bar,
            *body,
            bar,
            f"{len(body)} rows in set (0.{dice.between(0, 99):02d} sec)",
        ]
    )


def timetable(dice: Dice, world: World) -> str:
    """Make a bus timetable in Markdown."""
    stops = dice.some(world.places, dice.between(4, 5))
    starts = sorted(dice.between(300, 1200) for _ in range(4))
    gaps = [0]
    for _ in stops[1:]:
        gaps.append(gaps[-1] + dice.between(4, 19))
    lines = [
        f"**Line {dice.between(2, 98)}** · {stops[0]} – {stops[-1]} · valid from {world.iso_date(dice)}",
        "",
        "| Stop | " + " | ".join(f"Run {n}" for n in range(1, 5)) + " |",
        "|---" * 5 + "|",
    ]
    for stop, gap in zip(stops, gaps, strict=True):
        times = [f"{(s + gap) // 60:02d}:{(s + gap) % 60:02d}" for s in starts]
        lines.append(f"| {stop} | " + " | ".join(times) + " |")
    lines.append("")
    lines.append(f"Journey time {gaps[-1]} min. No service on public holidays.")
    return "\n".join(lines)


def chinese_table(dice: Dice, world: World) -> str:
    """Make a stock list in Chinese with units, prices and a sum."""
    place = dice.pick(world.chinese_places)
    year, month, day = world.date(dice)
    lines = [
        f"{place}门店盘点表（{year}年{month}月{day}日）",
        "",
        "| 品名 | 单价（元） | 数量 | 金额（元） | 备注 |",
        "|---|---:|---:|---:|---|",
    ]
    total = 0
    for good in dice.some(world.chinese_goods, dice.between(4, 5)):
        price, count = dice.between(80, 9900), dice.between(3, 240)
        total += price * count
        note = dice.pick(("", "待补货", "新到", "促销中", "库存偏高"))
        lines.append(f"| {good[1:]} | {cents(price)} | {count} | {cents(price * count)} | {note} |")
    person = dice.pick(world.chinese_people)
    lines += ["", f"合计：{cents(total)}元。盘点人：{person}。"]
    return "\n".join(lines)


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


RECIPES = (
    Recipe("structured", order_json, 2, 1),
    Recipe("structured", events_jsonl, 2, 1),
    Recipe("structured", service_yaml, 2, 1),
    Recipe("structured", pipeline_yaml, 2, 0),
    Recipe("structured", sensor_csv, 2, 1),
    Recipe("structured", sales_table, 2, 1),
    Recipe("structured", access_log, 2, 1),
    Recipe("structured", service_log, 2, 1),
    Recipe("structured", catalog_xml, 2, 0),
    Recipe("structured", project_toml, 2, 1),
    Recipe("structured", http_exchange, 2, 1),
    Recipe("structured", geojson, 2, 0),
    Recipe("structured", query_result, 2, 0),
    Recipe("structured", timetable, 2, 0),
    Recipe("structured", chinese_table, 2, 1),
    Recipe("structured", diff, 2, 0),
    Recipe("structured", unit_file, 2, 0),
    Recipe("structured", listing_of_files, 2, 0),
)
