// What the pages share. Everything that comes from a model or a person is put in as text, never as HTML.

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const find = (id) => document.getElementById(id);

// The answer's JSON. Errors carry `status`: 0 where there was no answer at all.
export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw problem(0, "The server cannot be reached. Start sysdag label again with the same database.");
  }
  const text = await response.text();
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw problem(response.status, text.trim() || `The server answered with ${response.status}.`);
  }
  if (!response.ok) {
    throw problem(response.status, content.error ?? `The server answered with ${response.status}.`);
  }
  return content;
}

function problem(status, message) {
  return Object.assign(new Error(message), { status });
}

// Elements for a value as sysdag.labelling.view describes it.
export function shown(view, name) {
  if (view.kind === "image") {
    const image = make("img", {
      src: view.source,
      width: view.width,
      height: view.height,
      alt: `Image of ${name}, ${view.width} by ${view.height} pixels`,
    });
    if (Math.max(view.width, view.height) < 128) image.classList.add("tiny");
    return image;
  }
  if (view.kind === "list") {
    if (!view.items.length) return make("p", { className: "empty", textContent: "an empty list" });
    const images = view.items.every((item) => item.kind === "image");
    const list = make("ol", { className: images ? "images" : "" });
    view.items.forEach((item, index) => list.append(make("li", {}, shown(item, `${name}, element ${index + 1}`))));
    return list;
  }
  if (view.kind === "fields") {
    const fields = make("dl", { className: "fields" });
    for (const item of view.items) {
      fields.append(make("dt", { textContent: item.name }), make("dd", {}, shown(item.view, item.name)));
    }
    return fields;
  }
  if (!view.text.trim()) return make("p", { className: "empty", textContent: view.text ? "only white space" : "an empty text" });
  return make("p", { className: "text", dir: "auto", textContent: view.text });
}

export function block(part) {
  return make("div", { className: "value" }, make("h3", { textContent: part.name }), shown(part.view, part.name));
}
