"use strict";
(() => {
  const form = document.getElementById("form");
  const button = form.querySelector("button");
  const said = document.getElementById("said");
  const bar = document.getElementById("progress");
  const list = document.getElementById("drawn");
  let refused = ""; // why the last request was not taken; until the next

  function showPicture(drawing) {
    const figure = document.createElement("figure");
    figure.id = `drawing-${drawing.number}`;
    const caption = document.createElement("figcaption");
    caption.textContent = drawing.words;
    const picture = document.createElement("img");
    picture.src = `drawn/${drawing.number}.png`;
    picture.alt = drawing.words;
    figure.append(caption, picture);
    list.prepend(figure);
  }

  function show(state) {
    const now = state.now;
    const drawing = now && (now.state === "loading" || now.state === "drawing");
    button.disabled = Boolean(drawing || state.busy);
    bar.hidden = !drawing;
    if (drawing && now.state === "drawing") bar.value = now.done / now.total;
    else bar.removeAttribute("value");
    said.className = refused || (now && now.state === "failed") ? "note" : "";
    if (refused) said.textContent = refused;
    else if (drawing) said.textContent = now.state === "loading" ? "Loading the checkpoint ..."
      : `${Math.floor(now.done)} of ${now.total} images`;
    else if (state.busy) said.textContent = `${state.busy}. Samples are drawn when it is idle.`;
    else if (now && now.state === "failed") said.textContent = now.said;
    else said.textContent = now ? `Done: ${now.said}` : "Nothing drawn yet.";
    for (const done of state.drawn) {
      if (!document.getElementById(`drawing-${done.number}`)) showPicture(done);
    }
  }

  async function look() {
    let wait = 2000;
    if (!document.hidden) {
      try {
        const state = await (await fetch("draw/state", { cache: "no-store" })).json();
        show(state);
        if (!bar.hidden) wait = 300;
      } catch {
        said.className = "note";
        said.textContent = "No answer: has fastrepa watch ended?";
        button.disabled = true;
      }
    }
    setTimeout(look, wait);
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    refused = "";
    const wanted = Object.fromEntries(new FormData(form));
    for (const key of ["num", "seed", "cfg", "steps"]) wanted[key] = Number(wanted[key]);
    try {
      const answer = await fetch("draw", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(wanted),
      });
      const state = await answer.json();
      refused = state.refused;
      show(state);
    } catch {
      refused = "No answer: has fastrepa watch ended?";
    }
  });
  look();
})();
