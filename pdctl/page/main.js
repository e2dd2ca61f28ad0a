// Stream into picture, picture onto the page: at most four times a second; while nobody looks, into the title alone.

const DRAW_MS = 250;
const EVENTS_AT_FIRST = 200;

const picture = new Picture();
const announcer = { element: byId("said"), waiting: [] };
const verdict = new Verdict(), fleet = new Fleet(), links = new Links((words) => setText(byId("said-cell"), words));
const events = new Events(), chart = new Chart(byId("chart"), byId("chart-words"));
const stream = new Stream(hear, turn);

let filter = "", linkState = "connecting", linkWords = "", due = null, drawn = 0, took = 0, lastVerdict = null;

function hear(kind, body) {
  const now = performance.now();
  if (kind === "overview") {
    picture.overview(body, now);
    recall(body.events || {}).catch(() => {}); // the stream itself will say that the registry is gone
  } else if (kind === "service") picture.setService(body, now);
  else if (kind === "event") hearEvent(body);
  else if (kind === "instance" || kind === "report" || kind === "session") picture[kind](body, now);
  drawSoon();
}

function hearEvent(event) {
  picture.event(event);
  if (SAID_ALOUD.has(event.kind)) say(event.sentence);
}

/** What happened before this page was opened, or while it heard nothing. A registry that began anew counts anew. */
async function recall({ next = 1 }) {
  picture.forgetEvents();
  const told = await stream.get(`v1/events?limit=${EVENTS_AT_FIRST}&since=${Math.max(0, next - EVENTS_AT_FIRST)}`);
  for (const event of told.events) picture.event(event);
  drawSoon();
}

function turn(state, words = "") {
  if (linkState === "live" && state !== "live") say("The registry has fallen silent.");
  if (linkState !== "live" && state === "live" && picture.known) say("The registry speaks.");
  linkState = state;
  linkWords = words;
  drawSoon();
}

/** To those who hear the page: together, so that a storm is one sentence and not a hundred. */
function say(sentence) {
  announcer.waiting.push(sentence);
  if (announcer.waiting.length > 1) return;
  setTimeout(() => {
    const told = announcer.waiting.splice(0);
    setText(announcer.element, told.slice(0, 3).join(" ") + (told.length > 3 ? ` And ${told.length - 3} more events.` : ""));
  }, 400);
}

function drawSoon() {
  if (due !== null) return;
  const rest = Math.max(DRAW_MS, 4 * took); // of thousands of ranks a picture takes a while: most of the time is the reader's
  const next = () => (document.hidden ? draw() : requestAnimationFrame(draw)); // a hidden tab is given no frames
  due = setTimeout(next, Math.max(0, drawn + rest - performance.now()));
}

function draw() {
  due = null;
  drawn = performance.now();
  show();
  took = performance.now() - drawn;
}

function show() {
  showLink();
  byId("main").hidden = !picture.known || linkState === "token";
  if (byId("main").hidden) return;
  const now = drawn;
  picture.meter.trim(now);
  const seen = { picture, filter, now, links: linksOf(picture), rooms: roomsOf(picture) };
  const problems = problemsOf(picture, seen.links, seen.rooms, now);
  title(problems);
  if (document.hidden) return;
  verdict.show(problems, picture);
  showTiles(seen);
  fleet.show(seen);
  links.show(seen);
  chart.show(picture.meter, now);
  showRooms(seen);
  events.show(seen);
}

/** What a tab among many should say. */
function title(problems) {
  const bad = problems.filter((each) => each.grade === "bad").length;
  const words = linkState !== "live" ? "(?) pdctl" : bad ? `(${bad}) pdctl` : "pdctl";
  if (document.title !== words) document.title = words;
  const verdictNow = verdictOf(problems, picture);
  if (lastVerdict !== null && lastVerdict !== verdictNow) say(`${verdictNow}.`);
  lastVerdict = verdictNow;
}

function showLink() {
  const silent = stream.lastWord === null ? "" : ` for ${inWords((performance.now() - stream.lastWord) / 1000)}`;
  const words = {
    connecting: "connecting",
    live: "live",
    silent: `no word from the registry${silent}`,
    refused: `refused: ${linkWords}`,
    token: "a token is wanted",
  }[linkState];
  setAttribute(document.body, "data-link", linkState === "refused" ? "silent" : linkState);
  setAttribute(byId("link"), "data-state", linkState);
  setText(byId("link-words"), words);
  setText(byId("service"), serviceWords(picture.service));
  byId("ask").hidden = linkState !== "token";
  setText(byId("ask-why"), linkWords);
  byId("forget").hidden = !stream.token || linkState === "token";
}

function serviceWords(service) {
  const age = service.uptime_s === undefined ? null : service.uptime_s + (performance.now() - service.heard) / 1000;
  return [service.version, service.journal && `journal ${service.journal}`, age !== null && `up ${inWords(age)}`].filter(Boolean).join(" · ");
}

byId("filter").addEventListener("input", (event) => { filter = event.target.value.trim().toLowerCase(); drawSoon(); });
byId("forget").addEventListener("click", () => stream.use(null));
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  stream.use(byId("token").value.trim());
  byId("token").value = "";
});
document.addEventListener("visibilitychange", drawSoon);
setInterval(drawSoon, 1000); // ages
stream.run();
