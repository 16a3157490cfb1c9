import { ask, block, find, make, shown } from "/page.js";

// A new pair takes no label for so long, so that the second half of a double click does not label it unseen.
const SETTLE_MS = 350;
const KEYS = {
  pairs: { arrowleft: "left", arrowright: "right", "=": "tie", t: "tie" },
  thumbs: { g: "up", b: "down" },
  scores: { 1: "1", 2: "2", 3: "3", 4: "4", 5: "5" },
};
const EVERYWHERE = { s: "skip", u: "undo", i: "unfold", "?": "help" };
const QUESTIONS = {
  pairs: (name) => `Which ${name} is better?`,
  thumbs: (name) => `Is this ${name} good?`,
  scores: (name) => `How good is this ${name}?`,
};

let annotator = null;
let queue = null;
let outputs = [];
let choices = [];
let collect = "pairs"; // or thumbs or scores, of single runs
let settling = 0;

const state = (name) => { document.body.dataset.state = name; };
const unit = () => (collect === "pairs" ? "pair" : "run");
const isReady = () => document.body.dataset.state === "ready";

function say(message, retry = null) {
  find("notice-text").textContent = message;
  find("notice").hidden = !message;
  find("retry").hidden = retry === null;
  find("retry").onclick = retry;
}

function show(...ids) {
  for (const id of ["sign-in", "finished", "comparison", "actions", "progress"]) find(id).hidden = !ids.includes(id);
}

async function signIn(name) {
  state("busy");
  try {
    if (!choices.length) await loadSession();
    queue = await ask("/api/queue", { annotator: name });
  } catch (error) {
    askName();
    say(error.message, error.status === 0 ? () => signIn(name) : null);
    return;
  }
  annotator = queue.annotator;
  sessionStorage.setItem("annotator", annotator);
  say("");
  render("");
}

function askName() {
  annotator = null;
  sessionStorage.removeItem("annotator");
  find("annotator-button").hidden = true;
  show("sign-in");
  state("sign-in");
  find("name").focus();
  loadSession().catch((error) => say(error.message));
}

async function loadSession() {
  const session = await ask("/api/session");
  outputs = session.outputs;
  collect = session.collect;
  choices = [...session.choices, "skip"];
  document.body.dataset.collecting = collect;
  for (const part of document.querySelectorAll("[data-collect]")) part.hidden = part.dataset.collect !== collect;
  find("names").replaceChildren(...session.annotators.map((name) => make("option", { value: name })));
}

function fill(id, part) {
  const single = part.outputs.length === 1 ? part.outputs[0] : null; // its name stands beside the letter
  find(`${id}-name`).textContent = single ? single.name : "";
  const values = single ? [shown(single.view, single.name)] : part.outputs.map(block);
  const content = [make("div", { className: "outputs" }, ...values)];
  if (part.intermediates.length) {
    const names = part.intermediates.map((one) => one.name).join(", ");
    const summary = make("summary", {}, "How it got there: ", make("span", { className: "names", textContent: names }));
    content.push(make("details", {}, summary, ...part.intermediates.map(block)));
  }
  find(id).replaceChildren(...content);
}

function render(message) {
  const { task, done, total, last } = queue;
  find("annotator-button").hidden = false;
  find("annotator-button").textContent = annotator;
  find("progress-bar").max = Math.max(total, 1);
  find("progress-bar").value = done;
  find("progress-text").textContent = `${done} of ${total}`;
  for (const button of document.querySelectorAll("[data-action=undo]")) button.disabled = last === null;
  if (task === null) {
    show("finished", "progress");
    find("finished-text").textContent = total
      ? `There is no ${unit()} left for you, ${annotator}: you have seen ${done} of ${total}.`
      : `There is no ${unit()} left for you, ${annotator}: others have labelled them all.`;
    find("finished-heading").focus();
  } else {
    show("comparison", "actions", "progress");
    const name = outputs.length === 1 ? outputs[0] : "result";
    find("question").textContent = QUESTIONS[collect](name);
    find("inputs").replaceChildren(...task.inputs.map(block));
    fill("left", task.run ?? task.left);
    if (!task.run) fill("right", task.right);
    window.scrollTo(0, 0);
    find("question").focus({ preventScroll: true });
  }
  find("status").textContent = `${message} ${task === null ? `No ${unit()} is left.` : `${unit() === "run" ? "Run" : "Pair"} ${done + 1} of ${total}.`}`.trim();
  clearTimeout(settling);
  state("settling");
  settling = setTimeout(() => state("ready"), SETTLE_MS);
}

async function send(path, body, message) {
  state("busy");
  try {
    queue = await ask(path, body);
    say("");
    render(message);
  } catch (error) {
    if (error.status === 409) {
      await signIn(annotator); // the queue as it is now
      say(error.message);
    } else {
      say(`Not saved. ${error.message}`, () => send(path, body, message)); // the same request, recorded once
      state("stopped");
      find("retry").focus();
    }
  }
}

function requestName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function act(action) {
  if (action === "help") {
    find("help").showModal();
  } else if (action === "unfold") {
    const all = [...document.querySelectorAll("#comparison details")];
    const open = all.some((one) => !one.open);
    for (const one of all) one.open = open;
  } else if (!isReady() || queue === null) {
    return;
  } else if (action === "undo" && queue.last !== null) {
    send("/api/undo", { annotator, label: queue.last, request: requestName() }, "Undone.");
  } else if (choices.includes(action) && queue.task !== null) {
    const message = action === "skip" ? "Skipped." : "Saved.";
    send("/api/label", { annotator, pair: queue.task.pair, choice: action, request: requestName() }, message);
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (button) act(button.dataset.action);
});

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  const action = KEYS[collect][key] ?? EVERYWHERE[key];
  const typing = event.target.closest("input, textarea, select, dialog");
  if (!action || typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act(action);
});

find("help-button").addEventListener("click", () => act("help"));
find("annotator-button").addEventListener("click", () => { if (isReady()) askName(); });
find("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn(find("name").value);
});

async function start() {
  const asked = new URLSearchParams(location.search).get("annotator");
  history.replaceState(null, "", "/"); // the token is in the cookie now, and leaves the address
  const name = asked ?? sessionStorage.getItem("annotator");
  if (name) {
    await loadSession();
    await signIn(name);
  } else {
    askName();
  }
}

start().catch((error) => say(error.message, () => location.reload()));
