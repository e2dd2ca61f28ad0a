"""
The page at `/`: the fleet as people see it, in one document that needs nothing else.

    GET, HEAD  /    pdctl/page, its style and its scripts put into the document; the same bytes for everybody

It holds nothing of the fleet: it asks /v1/overview/watch for it, with a token where one is wanted. Its policy lets it
speak to this service alone and run no script but its own, and no text can become markup (trusted types).
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

FILES = Path(__file__).parent.parent / "page"
SCRIPTS = ("model.js", "stream.js", "rows.js", "links.js", "panels.js", "main.js")
"""In the order in which they stand in the one script: who is named stands before whoever names it at once."""


def router() -> APIRouter:
    api = APIRouter()
    document, headers = page()

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def shown(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(document, media_type="text/html", headers=headers)

    return api


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The document, and what goes with it."""
    style = (FILES / "page.css").read_text("utf-8")
    script = "".join(['"use strict";\n', *((FILES / name).read_text("utf-8") for name in SCRIPTS)])
    script = f"(() => {{\n{script}\n}})();"
    text = (FILES / "index.html").read_text("utf-8")
    text = text.replace("<!-- style -->", f"<style>{style}</style>")
    text = text.replace("<!-- script -->", f"<script>{script}</script>")
    document = text.encode()
    return (
        document,
        {
            "Content-Security-Policy": policy(style, script),
            "Cache-Control": "no-cache",  # a browser asks each time whether it still has the page of this version
            "ETag": f'"{hashlib.sha256(document).hexdigest()[:32]}"',
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
        },
    )


def policy(style: str, script: str) -> str:
    """Nothing from anywhere but what stands in the document; `data:` is its icon."""
    return "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src data:",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _digest(text: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
