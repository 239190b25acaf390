// Two models answer one question side by side; each goes on from its own answers.

const byId = (id) => document.getElementById(id);
const columns = [...document.querySelectorAll("select.model")].map((model) => ({
  model,
  history: [],
}));
const KEY = "api-key";
let running = null; // Aborts the answers that are being written.

/* What the server says. */

class ServerError extends Error {
  constructor(error, status) {
    super(error?.message || "The server gave an error without a message");
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) askForKey(key);
  const error = await response.json().then((body) => body?.error, () => null);
  const wait = response.headers.get("Retry-After");
  const message = error?.message || response.statusText || "The request failed";
  const advice = wait ? ` Try again in ${wait} s.` : "";
  throw new ServerError({ message: `${response.status}: ${message}${advice}` }, response.status);
}

// The data of server-sent events. Pieces may end anywhere, also within a character.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A CR at the end may be half of a CRLF.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // Whatever ends this hangs up.
  }
}

// What a stream of chat completions says, piece by piece, and at its end what it took.
async function* pieces(response) {
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new ServerError(error);
    const [choice] = choices ?? [];
    yield { text: choice?.delta?.content ?? "", ending: choice?.finish_reason, usage };
  }
  throw new ServerError({ message: "The connection ended before the answer did." });
}

/* What is asked. */

function request(column, messages) {
  const system = byId("system").value.trim();
  const body = {
    model: column.model.value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const id of ["temperature", "max-tokens", "seed"]) {
    const value = byId(id).valueAsNumber;
    if (!Number.isNaN(value)) body[id.replace("-", "_")] = value;
  }
  return body;
}

// One column's answer, written as it comes; false if it failed, and then nothing is kept of it.
async function answer(column, said, cell, signal) {
  const history = column.history; // A new conversation has another.
  const messages = [...history, { role: "user", content: said }];
  const start = performance.now();
  const took = {};
  let text = "";
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request(column, messages)),
      signal,
    });
    for await (const piece of pieces(response)) {
      if (piece.text) {
        took.end = performance.now() - start;
        took.first ??= took.end;
        text += piece.text;
        following(() => show(cell.text, text));
      }
      took.ending = piece.ending ?? took.ending;
      took.usage = piece.usage ?? took.usage;
    }
  } catch (error) {
    if (!signal.aborted) {
      following(() => cell.fail(reason(error)));
      if (error.status === 404) loadModels(); // The adapter may have been taken away.
      return false;
    }
    took.ending = "stopped";
  } finally {
    cell.article.ariaBusy = "false";
  }
  if (text) history.push(messages.at(-1), { role: "assistant", content: text });
  following(() => cell.figures.append(figures(took)));
  return true;
}

function reason(error) {
  if (error instanceof ServerError) return error.message;
  if (error instanceof SyntaxError) return "The server sent what is not JSON.";
  return "The server does not answer.";
}

function figures({ usage, first, end, ending }) {
  const time = (ms) => (ms < 1000 ? `${ms.toFixed()} ms` : `${(ms / 1000).toFixed(1)} s`);
  const tokens = usage?.completion_tokens;
  const said = [];
  if (tokens !== undefined) said.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (tokens > 1 && end) said.push(`${Number(((1000 * tokens) / end).toPrecision(3))} tokens/s`);
  if (first !== undefined) said.push(`first after ${time(first)}`);
  if (ending === "length") said.push("cut at max tokens");
  if (ending === "stopped") said.push("stopped");
  return said.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

/* What is seen. */

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// Text as it is; lines between fences stand in a block of code, fences and all.
function show(element, text) {
  const parts = text.split(/(^```.*\n[^]*?(?:^```[ \t]*(?:\n|$(?![^]))|$(?![^])))/m);
  parts.forEach((part, n) => {
    const block = element.children[n] ?? element.appendChild(make(n % 2 ? "pre" : "p", ""));
    if (block.textContent !== part) block.textContent = part;
  });
}

const page = document.documentElement;

function toEnd() {
  page.scrollTop = page.scrollHeight;
}

// Change what is seen, and stay at the end of the page if that is where the reader is.
function following(change) {
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 60;
  change();
  if (atEnd) toEnd();
}

function newCell(column) {
  const article = make("article", "answer");
  const text = make("div", "text");
  const below = make("p", "figures");
  article.append(make("h2", "", column.model.value), text, below);
  article.ariaBusy = "true"; // Read out when it is whole, not word by word.
  return { article, text, figures: below, fail: (why) => article.append(make("p", "error", why)) };
}

function newTurn(said) {
  const turn = make("section", "turn");
  const pair = make("div", "pair");
  const cells = columns.map(newCell);
  pair.append(...cells.map((cell) => cell.article));
  const question = make("div", "said");
  show(question, said);
  turn.append(question, pair);
  byId("hint").hidden = true;
  byId("turns").append(turn);
  toEnd();
  return cells;
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

async function send() {
  const field = byId("text");
  const said = field.value;
  if (running || !said.trim() || !columns.every((column) => column.model.value)) return;
  if (!byId("options").checkValidity()) {
    toggleOptions(true);
    byId("options").reportValidity();
    return;
  }
  const controller = new AbortController();
  setRunning(controller);
  field.value = "";
  const cells = newTurn(said);
  const answered = await Promise.all(
    columns.map((column, n) => answer(column, said, cells[n], controller.signal)),
  );
  if (running === controller) setRunning(null);
  if (!answered.some(Boolean)) field.value ||= said; // Nobody heard it: to be said again.
}

function stop() {
  running?.abort();
}

function forget() {
  stop();
  setRunning(null);
  for (const column of columns) column.history = [];
  byId("turns").replaceChildren(byId("hint"));
  byId("hint").hidden = false;
  byId("text").focus();
}

function toggleOptions(open) {
  byId("options").hidden = !open;
  byId("options-button").ariaExpanded = String(open);
}

/* Models, and the key to them. */

async function loadModels() {
  const notice = byId("notice");
  try {
    const { data } = await (await call("v1/models")).json();
    fill(data);
    notice.hidden = true;
    byId("key-form").hidden = true;
  } catch (error) {
    notice.textContent = reason(error);
    notice.hidden = false;
  }
}

// Each column keeps its model while that is there; two adapters, or the base and one, come first.
function fill(models) {
  const adapters = models.filter((model) => model.parent);
  const first = adapters.slice(0, columns.length);
  while (first.length < columns.length) first.unshift(models[0]);
  columns.forEach(({ model }, n) => {
    const shown = [...model.options].map((option) => option.value);
    if (shown.join("\n") === models.map(({ id }) => id).join("\n")) return; // It may be open.
    const names = models.map(({ id, parent }) => new Option(parent ? id : `${id} (base)`, id));
    const kept = models.find(({ id }) => id === model.value) ?? first[n];
    model.replaceChildren(...names);
    model.value = kept.id;
  });
}

function askForKey(refused) {
  // Another may have been given since.
  if (sessionStorage.getItem(KEY) === refused) sessionStorage.removeItem(KEY);
  if (!byId("key-form").hidden) return;
  byId("key-form").hidden = false;
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  loadModels();
});
byId("options-button").addEventListener("click", () => toggleOptions(byId("options").hidden));
byId("new").addEventListener("click", forget);
byId("stop").addEventListener("click", stop);
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("text").addEventListener("keydown", (event) => {
  // An Enter that chooses among an input method's proposals is not meant for us.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
// Adapters may have come while the reader was elsewhere.
addEventListener("focus", loadModels);
loadModels();
