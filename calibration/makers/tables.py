"""Tables: sales, query results, timetables, stock lists."""

from __future__ import annotations

from .common import Dice, World, cents


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
