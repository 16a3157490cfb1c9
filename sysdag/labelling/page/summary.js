import { ask, find, make } from "/page.js";

const HEADS = { left: "A (left)", right: "B (right)", tie: "Ties", up: "Good", down: "Bad" };
const percent = (share) => `${Math.round(100 * share)} %`;

function figure(value, name, detail = "") {
  return make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }),
    make("dd", { className: "detail", textContent: detail }));
}

function render(summary) {
  const { pairs, labelled, overlap, annotators, agreement, left_share: left, units, choices } = summary;
  const figures = [figure(`${labelled} of ${pairs}`, `${units === "pairs" ? "Pairs" : "Runs"} labelled`, percent(labelled / pairs))];
  if (agreement) {
    const value = agreement.value === null ? "undefined" : agreement.value.toFixed(2);
    const why = agreement.value === null ? "all labels are alike" : `agreed on ${agreement.same} of ${agreement.pairs} ${units}`;
    figures.push(figure(value, agreement.measure, why));
  }
  if (left) {
    figures.push(figure(percent(left[0]), "A (left) preferred", `95 % interval ${percent(left[1])} to ${percent(left[2])}`));
  }
  find("figures").replaceChildren(...figures);
  const names = ["Name", "Labels", ...choices.map((choice) => HEADS[choice] ?? choice), "Skipped", "Undone"];
  find("columns").replaceChildren(...names.map((name) => make("th", { scope: "col", textContent: name })));
  find("annotators").replaceChildren(...annotators.map((one) => make("tr", {},
    make("th", { scope: "row", textContent: one.name }),
    ...[one.labels, ...choices.map((choice) => one.choices[choice]), one.skipped, one.undone].map((n) => make("td", { textContent: n })))));
  find("note").textContent = agreement
    ? "Agreement is corrected for chance: 1 is perfect, 0 what guessing gives."
    : `Agreement shows once two annotators have labelled the same ${units.slice(0, -1)}; everyone gets the first ${overlap}.`;
  find("summary").hidden = false;
}

ask("/api/summary").then(render, (error) => {
  find("notice-text").textContent = error.message;
  find("notice").hidden = false;
});
