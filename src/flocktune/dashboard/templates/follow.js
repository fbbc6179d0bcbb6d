"use strict";
// Asks every two seconds whether anything on the page has changed, and replaces those parts alone.
const EVERY_MS = 2000, PATIENCE_MS = 30000;
const body = document.body, link = document.getElementById("link"), news = document.getElementById("news");
const filter = document.getElementById("filter");
let tag = body.dataset.tag, timer = 0, lostAt = null;

function spoken(seconds) {
  const whole = Math.max(0, Math.round(seconds)), minutes = Math.floor(whole / 60), hours = Math.floor(minutes / 60);
  if (hours >= 48) return `${Math.floor(hours / 24)} days`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

// As coarse as an estimate is.
function coarse(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds / 10) * 10} s` : spoken(Math.ceil(seconds / 60) * 60).replace(/ 0 s$/, "");
}

function tellTime() {
  const now = Date.now() / 1000;
  for (const time of document.querySelectorAll("time[data-ago]")) {
    time.textContent = `${spoken(now - time.dataset.ago)} ago`;
  }
  for (const time of document.querySelectorAll("time[data-until]")) {
    time.textContent = time.dataset.until > now + 1 ? `about ${coarse(time.dataset.until - now)} left` : "nearly done";
  }
}

function narrow() {
  if (!filter) return;
  const wanted = filter.value.trim().toLowerCase();
  for (const row of document.querySelectorAll("tr[data-find]")) row.hidden = !row.dataset.find.includes(wanted);
  let shown = 0;
  for (const group of document.querySelectorAll(".group")) {
    group.hidden = !group.querySelector("tr[data-find]:not([hidden])");
    shown += !group.hidden;
  }
  const none = document.getElementById("none");
  if (none) none.hidden = shown > 0;
}

// What a reader has opened, scrolled to or stands on stays as it is.
function replace(section, html) {
  const held = () => [...section.querySelectorAll("a, summary, [tabindex]")];
  const at = document.activeElement, id = at?.id, place = held().indexOf(at);
  const open = [...section.querySelectorAll("details")].map(each => each.open);
  const scrolled = [...section.querySelectorAll(".scroll")].map(each => each.scrollLeft);
  section.innerHTML = html;
  section.hidden = !html;
  section.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? each.open; });
  section.querySelectorAll(".scroll").forEach((each, index) => { each.scrollLeft = scrolled[index] ?? 0; });
  if (place >= 0) ((id && document.getElementById(id)) || held()[place])?.focus({ preventScroll: true });
}

function isBeingRead(section) {
  const selection = getSelection();
  return !selection.isCollapsed && section.contains(selection.anchorNode);
}

function show(page) {
  tag = page.tag;
  for (const [name, [digest, html]] of Object.entries(page.parts)) {
    const section = document.getElementById(name);
    if (!section || section.dataset.digest === digest) continue;
    if (isBeingRead(section)) { tag = ""; continue; }  // later
    replace(section, html);
    section.dataset.digest = digest;
  }
  if (document.title !== `${page.title} · flocktune`) document.title = `${page.title} · flocktune`;
  if (news.dataset.said !== undefined && news.dataset.said !== page.news) news.textContent = page.news;
  news.dataset.said = page.news;
  narrow();
  tellTime();
}

function tell(text, lost) {
  const [, words] = link.children;
  link.classList.toggle("lost", lost);
  if (words.textContent !== text) words.textContent = text;
}

async function look() {
  clearTimeout(timer);
  if (!document.hidden) {
    try {
      const address = `${body.dataset.live}?known=${encodeURIComponent(tag)}`;
      const reply = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!reply.ok) throw new Error(reply.status);
      const page = await reply.json();
      lostAt = null;
      tell(page.gone ? "its folder is gone" : "live", Boolean(page.gone));
      if (page.gone) tag = "";
      if (page.parts) show(page);
    } catch {
      lostAt ??= new Date();
      tell(`connection lost at ${lostAt.toLocaleTimeString()}; trying again`, true);
    }
  }
  timer = setTimeout(look, EVERY_MS);
}

if (filter) {
  filter.closest("p").hidden = false;
  filter.addEventListener("input", narrow);
  narrow();  // a browser that comes back to the page keeps what was typed
}
tellTime();
setInterval(tellTime, 1000);
if (body.dataset.live) {
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  timer = setTimeout(look, EVERY_MS);
}
