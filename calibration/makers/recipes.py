"""Every maker, with its domain and the number of documents it writes for each of the two files.

The order is part of the output: documents of a domain are shuffled from it.
"""

from __future__ import annotations

from .algebra import binomials, integral, linear_equation, matrices, progression, quadratic, tangent, two_equations
from .arithmetic import (
    chinese_problem,
    compound_interest,
    conversions,
    fractions,
    long_division,
    long_multiplication,
)
from .chats import (
    chinese_shop,
    date_questions,
    numbers_in_words,
    recipe_scaling,
    sort_list,
    split_bill,
    time_zones,
    to_json,
)
from .common import Recipe
from .data_files import (
    catalog_xml,
    events_jsonl,
    geojson,
    order_json,
    pipeline_yaml,
    project_toml,
    sensor_csv,
    service_yaml,
)
from .number_theory import bases, euclid, modular_power, prime_factors
from .records import (
    access_log,
    diff,
    http_exchange,
    listing_of_files,
    service_log,
    unit_file,
)
from .tables import chinese_table, query_result, sales_table, timetable
from .thoughts import (
    think_chickens,
    think_letters,
    think_meeting,
    think_order,
    think_price,
    think_product,
    think_ratio,
    think_schedule,
    think_trace,
    think_weekday,
)

RECIPES = (
    Recipe("math", long_multiplication, 2, 1),
    Recipe("math", long_division, 2, 1),
    Recipe("math", euclid, 2, 1),
    Recipe("math", linear_equation, 2, 1),
    Recipe("math", quadratic, 2, 1),
    Recipe("math", two_equations, 2, 1),
    Recipe("math", tangent, 2, 1),
    Recipe("math", integral, 2, 1),
    Recipe("math", prime_factors, 2, 1),
    Recipe("math", modular_power, 2, 1),
    Recipe("math", compound_interest, 2, 0),
    Recipe("math", fractions, 2, 0),
    Recipe("math", progression, 2, 1),
    Recipe("math", matrices, 2, 0),
    Recipe("math", bases, 2, 0),
    Recipe("math", binomials, 2, 0),
    Recipe("math", conversions, 2, 0),
    Recipe("math", chinese_problem, 2, 1),
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
    Recipe("chat", recipe_scaling, 3, 1),
    Recipe("chat", split_bill, 3, 1),
    Recipe("chat", to_json, 3, 1),
    Recipe("chat", date_questions, 3, 1),
    Recipe("chat", sort_list, 3, 1),
    Recipe("chat", chinese_shop, 3, 1),
    Recipe("chat", numbers_in_words, 2, 1),
    Recipe("chat", time_zones, 3, 1),
    Recipe("chat-thinking", think_product, 2, 1),
    Recipe("chat-thinking", think_order, 3, 1),
    Recipe("chat-thinking", think_weekday, 2, 1),
    Recipe("chat-thinking", think_meeting, 2, 1),
    Recipe("chat-thinking", think_trace, 3, 1),
    Recipe("chat-thinking", think_chickens, 2, 1),
    Recipe("chat-thinking", think_price, 2, 1),
    Recipe("chat-thinking", think_letters, 2, 1),
    Recipe("chat-thinking", think_schedule, 2, 1),
    Recipe("chat-thinking", think_ratio, 2, 1),
)
