// What a preference is written as: a command line, Python, and where a server answers a request by curl.
"use strict";

/** A word for a POSIX shell. */
function shellWord(text) {
  return /^[\w=.,:\/@%+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** A preference as command lines take it: news=0.7,poems=0.3. */
function written(front, preference) {
  const numbers = rounded(front, preference);
  return front.objectives.filter((name) => numbers[name] > 0).map((name) => `${name}=${numbers[name]}`).join(",");
}

/** A preference as a Python dict. */
function pythonDict(front, preference) {
  const numbers = rounded(front, preference);
  const parts = front.objectives.filter((name) => numbers[name] > 0).map((name) => `${JSON.stringify(name)}: ${numbers[name]}`);
  return `{${parts.join(", ")}}`;
}

/** The commands that need no server: [title, text] pairs. */
function localCommands(front, preference) {
  const store = front.store ?? "STORE";
  return [
    ["Python", `import paretofuse as pf\n\nengine = pf.load(${JSON.stringify(store)})\nengine.switch(${pythonDict(front, preference)})\nmodel = engine.module`],
    ["Command line", `paretofuse merge ${shellWord(store)} --preference ${shellWord(written(front, preference))} -o OUT`],
  ];
}

/** Show commands, each with a button that copies it, anew after every change of the preference; returns what shows them. */
function showCommands(state, commands) {
  const place = byId("commands");
  function write() {
    const parts = commands(state.front, state[state.slot]).map(([title, text], index) => {
      const copy = element("button", { type: "button", textContent: "Copy", id: `copy-${index}` });
      copy.setAttribute("aria-label", `Copy ${title}`);
      copy.addEventListener("click", () => copyText(title, text));
      const head = element("header", {}, element("h3", { textContent: title, id: `command-${index}` }), copy);
      const shown = element("pre", {}, element("code", { textContent: text }));
      shown.setAttribute("aria-labelledby", `command-${index}`);
      shown.tabIndex = 0;
      return element("div", { className: "command" }, head, shown);
    });
    place.replaceChildren(...parts);
    byId("copied").textContent = "";
  }
  document.addEventListener("preference", write);
  write();
  return write;
}

/** Copy by the clipboard's interface, or where that is not allowed (a file, plain http) by a selection. */
async function copyText(title, text) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  byId("copied").textContent = done ? `Copied ${title}.` : "The browser does not let this page copy; select the text instead.";
}
