"""The page at /docs: the OpenAPI document as HTML, without scripts and without other hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
:root { --ink: #2b2320; --soft: #776a62; --line: #e6ddd3; --paper: #fdfbf8; --card: #ffffff;
        --ochre: #b5651d; --get: #2f6f4f; --post: #b5651d; --put: #7a5a00; --delete: #a3282f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #efe7df; --soft: #a99b8f; --line: #3b332d; --paper: #1c1815; --card: #24201c;
          --ochre: #e0964a; --get: #6fc199; --post: #e0964a; --put: #d9b84f; --delete: #e8787e; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper);
       color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; } h1 span { color: var(--ochre); }
h2 { margin: 2.4rem 0 .2rem; font-size: 1.2rem; } h3 { margin: 1rem 0 .3rem; font-size: .85rem;
     text-transform: uppercase; letter-spacing: .05em; color: var(--soft); }
p { margin: .3rem 0; } .soft, h2 + p { color: var(--soft); } a { color: var(--ochre); }
code, pre { font: .86em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { margin: .3rem 0; padding: .7rem .9rem; overflow: auto; background: var(--paper);
      border: 1px solid var(--line); border-radius: .4rem; }
details { margin: .4rem 0; background: var(--card); border: 1px solid var(--line);
          border-radius: .45rem; }
summary { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline;
          padding: .55rem .8rem; cursor: pointer; }
summary:hover { background: color-mix(in srgb, var(--ochre) 7%, transparent); }
summary b { min-width: 4.2rem; font: 700 .78rem/1.5 ui-monospace, monospace; }
summary code { overflow-wrap: anywhere; } summary span { margin-left: auto; color: var(--soft); }
.get { color: var(--get); } .post { color: var(--post); } .put, .patch { color: var(--put); }
.delete { color: var(--delete); } .body { padding: .2rem 1rem 1rem; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
td { padding: .25rem .8rem .25rem 0; border-top: 1px solid var(--line); vertical-align: top; }
td:first-child { white-space: nowrap; }
"""


def docs_html(document: dict[str, Any]) -> bytes:
    """A page that lists every operation of an OpenAPI document."""
    return "".join(_page(document)).encode()


def _page(document: dict[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
    yield "<header><h1><span>Ochre</span>DB API</h1>"
    yield f"<p class=soft>{escape(info['summary'])} Version {escape(info['version'])}.</p>"
    yield f"<p>{_text(info['description'])}</p>"
    yield '<p><a href="/openapi.json">openapi.json</a> · '
    yield '<a href="/metrics">metrics</a></p></header>'
    schemas = document["components"]["schemas"]
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2><p>{escape(tag['description'])}</p>"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if operation["tags"] == [tag["name"]]:
                    yield from _operation(method, path, operation, schemas)
    yield "<h2 id=types>Types</h2><p>Named above; <code>?</code> marks what may be left out.</p>"
    for name in _types(schemas):
        yield f'<details id="type-{name}"><summary><code>{name}</code></summary><div class=body>'
        yield f"<p>{_text(schemas[name].get('description', ''))}</p>"
        yield f"<pre>{escape(_sketch(schemas[name], schemas, 0))}</pre></div></details>"
    yield "</body></html>"


def _types(schemas: dict[str, Any]) -> list[str]:
    """Names of schemas that others are made of: sketches name them instead of repeating them."""
    inside = json.dumps(schemas)
    return [
        name
        for name, schema in schemas.items()
        if f'schemas/{name}"' in inside and schema.get("type") in ("object", None)
    ]


def _operation(
    method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]
) -> Iterator[str]:
    yield f'<details id="{escape(operation["operationId"])}"><summary>'
    yield f'<b class="{method}">{method.upper()}</b><code>{escape(path)}</code>'
    yield f"<span>{escape(operation['summary'])}</span></summary><div class=body>"
    if "description" in operation:
        yield f"<p>{_text(operation['description'])}</p>"
    if operation["parameters"]:
        yield "<h3>Parameters</h3><table>"
        for parameter in operation["parameters"]:
            yield f"<tr><td><code>{escape(parameter['name'])}</code> ({parameter['in']})</td>"
            yield f"<td>{_text(parameter['description'])}</td></tr>"
        yield "</table>"
    if "requestBody" in operation:
        yield "<h3>Request</h3>"
        yield from _schema(operation["requestBody"], schemas)
    yield "<h3>Responses</h3><table>"
    for status, response in operation["responses"].items():
        yield f"<tr><td><code>{status}</code></td><td>{_text(response['description'])}</td></tr>"
    yield "</table>"
    success = min(operation["responses"])
    yield from _schema(operation["responses"][success], schemas)
    yield "</div></details>"


def _schema(holder: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    (content,) = holder["content"].values()  # One media type each.
    reference = content["schema"]["$ref"]
    schema = schemas[reference.rsplit("/", 1)[1]]
    if "description" in schema:
        yield f"<p>{_text(schema['description'])}</p>"
    yield f"<pre>{escape(_sketch(schema, schemas, 0))}</pre>"


def _sketch(schema: dict[str, Any], schemas: dict[str, Any], depth: int) -> str:
    """A schema as an annotated JSON sketch; `depth` is its indentation."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        target = schemas[name]
        return name if name in _types(schemas) else _sketch(target, schemas, depth)
    if "enum" in schema:
        return " | ".join(json.dumps(item) for item in schema["enum"])
    if "oneOf" in schema:
        return " | ".join(_sketch(option, schemas, depth + 1) for option in schema["oneOf"])
    kinds = schema.get("type", "any")
    parts: list[str] = []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind == "array":
            items = _sketch(schema["items"], schemas, depth)
            parts.append(f"[{items}, ...]")
        elif kind == "object" and schema.get("properties"):
            required = schema.get("required", ())
            indent = "  " * (depth + 1)
            lines = [
                f"{indent}{json.dumps(name)}{'' if name in required else '?'}:"
                f" {_sketch(field, schemas, depth + 1)}"
                for name, field in schema["properties"].items()
            ]
            parts.append("{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}")
        elif kind == "object":
            values = schema.get("additionalProperties")
            inside = f"key: {_sketch(values, schemas, depth + 1)}" if values else ""
            parts.append("{" + inside + "}")
        else:
            parts.append(kind)
    return " | ".join(parts)


def _text(text: str) -> str:
    """Escaped, with `code` between backticks."""
    pieces = escape(text).split("`")
    return "".join(
        f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces)
    )
