"""Files of data: JSON, YAML, CSV, XML, TOML."""

from __future__ import annotations

import json

from .common import Dice, World, cents

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
