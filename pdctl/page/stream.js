// The registry's word, kept up: one stream of server-sent events by fetch, because an EventSource cannot send a token.
//
// Comes back by itself, later each time up to 5 s. Silence counts as an end: the registry says at least every 10 s that
// it lives. Knows nothing of what the messages mean.

const SILENT_MS = 16_000;
const AGAIN_MS = [300, 600, 1200, 2500, 5000];
const TOKEN = "pdctl.token";
const LONG_ROOM = /("room": ?)(\d{16,})/g; // drawn from 2**63, and a number here is whole up to 2**53

/** Lines of server-sent events -> {kind, data}; a half line waits for its other half. */
class Lines {
  constructor(tell) { this.tell = tell; this.rest = ""; this.kind = "message"; this.data = []; }

  feed(text) {
    const lines = (this.rest + text).split("\n");
    this.rest = lines.pop();
    for (const line of lines) this.line(line.endsWith("\r") ? line.slice(0, -1) : line);
  }

  line(line) {
    if (line === "") {
      if (this.data.length) this.tell(this.kind, this.data.join("\n"));
      this.kind = "message";
      this.data = [];
    } else if (line.startsWith("event:")) this.kind = line.slice(6).trim();
    else if (line.startsWith("data:")) this.data.push(line.slice(5).replace(/^ /, ""));
  }
}

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

class Stream {
  /** `hear(kind, body)` for each message; `turn(state, words)` when the link's state changes: live, silent, refused, token. */
  constructor(hear, turn) {
    this.hear = hear;
    this.turn = turn;
    this.failures = 0;
    this.lastWord = null;
    this.ended = () => {};
  }

  get token() { return sessionStorage.getItem(TOKEN); }

  /** A new token, or none; whatever is under way ends, and the registry is asked again at once. */
  use(token) {
    if (token) sessionStorage.setItem(TOKEN, token);
    else sessionStorage.removeItem(TOKEN);
    this.failures = 0;
    this.ended();
  }

  async run() {
    for (;;) {
      try {
        await this.listen();
        throw new Error("the registry ended the stream");
      } catch (error) {
        if (error.status === 401) await this.askForToken(error);
        else await this.comeAgain(error);
      }
    }
  }

  async listen() {
    const abort = new AbortController();
    this.ended = () => abort.abort();
    this.watched = setInterval(() => { if (performance.now() - this.heardAt > SILENT_MS) abort.abort(); }, 1000);
    this.heardAt = performance.now();
    try {
      const answer = await fetch("v1/overview/watch", { ...this.asking(), signal: abort.signal });
      if (!answer.ok) throw new Refused(answer.status, await reasonOf(answer));
      await this.read(answer.body);
    } finally {
      clearInterval(this.watched);
      abort.abort();
    }
  }

  async read(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    const lines = new Lines((kind, data) => this.take(kind, data));
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.heardAt = this.lastWord = performance.now();
      lines.feed(value);
    }
  }

  take(kind, data) {
    const body = JSON.parse(data.replace(LONG_ROOM, '$1"$2"'));
    if (kind === "bye") return;
    this.failures = 0;
    this.hear(kind, body);
    if (kind === "overview") this.turn("live");
  }

  async get(path) {
    const answer = await fetch(path, this.asking());
    if (!answer.ok) throw new Refused(answer.status, await reasonOf(answer));
    return JSON.parse((await answer.text()).replace(LONG_ROOM, '$1"$2"'));
  }

  asking() {
    const headers = { Accept: "text/event-stream, application/json" };
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    return { headers, cache: "no-store", credentials: "same-origin", redirect: "error" };
  }

  async askForToken(error) {
    this.turn("token", this.token ? error.message : "");
    await new Promise((done) => { this.ended = done; });
  }

  async comeAgain(error) {
    this.turn(error.status ? "refused" : "silent", error.status ? error.message : "");
    const wait = AGAIN_MS[Math.min(this.failures++, AGAIN_MS.length - 1)] * (0.75 + Math.random() / 2);
    await new Promise((done) => { this.ended = done; setTimeout(done, wait); });
  }
}

async function reasonOf(answer) {
  const text = (await answer.text()).slice(0, 500);
  if (answer.status === 404) return "this registry tells no overview (404): it is of another version than this page";
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `the registry answered ${answer.status}`;
  }
}
