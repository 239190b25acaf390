"""The chat page: its files, and what a browser lets them do."""

from importlib.resources import files

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
PATHS = {"/": "index.html", "/chat.js": "chat.js", "/chat.css": "chat.css"}
HEADERS = {
    # Text that a model writes can load, run and send nothing, even if the page had a hole.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # After an update of the server the three still belong together.
    "Cache-Control": "no-cache",
}


def page_file(path: str) -> tuple[bytes, dict[str, str]]:
    """One file of the page, by its path on the server, and the headers it is sent with.

    >>> body, headers = page_file("/chat.js")
    >>> headers["Content-Type"]
    'text/javascript; charset=utf-8'
    """
    name = PATHS[path]
    kind = TYPES[name.rpartition(".")[2]]
    body = files(__package__).joinpath("page", name).read_bytes()
    return body, {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}
