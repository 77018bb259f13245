/* The served page: asks for itself again and takes over what has changed. */
(() => {
  const every = 2000; // milliseconds, and more where an answer takes long
  const sections = (page) => new Map(
    [...page.querySelectorAll("section")].map((s) => [s.getAttribute("aria-labelledby"), s]));
  const known = new Map(); // what the server last sent of each section, which scripts change here
  let tag = null;

  const panelsOf = (section) =>
    [...section.querySelectorAll("figure.chart")].map((figure) => figure.id).join(" ");

  function chosenStep() {
    const slider = document.getElementById("sample-step");
    return slider && slider.value !== slider.max ? slider.dataset.steps.split(" ")[slider.value] : null;
  }

  function renew(page) {
    const here = sections(document);
    const fresh = sections(page);
    if ([...here.keys()].join() !== [...fresh.keys()].join()) {
      document.querySelector("main").replaceWith(document.adoptNode(page.querySelector("main")));
      known.clear();
      report.renewCurves(page, true);
      report.wireSamples();
      return;
    }
    for (const [id, section] of fresh) {
      const html = section.innerHTML;
      const old = here.get(id);
      if (known.get(id) === html) {
        if (id === "curves") report.renewCurves(page, false);
        continue;
      }
      const seen = known.has(id);
      known.set(id, html);
      if (id === "curves") {
        const replaced = panelsOf(old) !== panelsOf(section);
        if (replaced) old.innerHTML = html;
        report.renewCurves(page, replaced);
      } else if (id === "samples") {
        const step = chosenStep();
        const focused = document.activeElement?.id === "sample-step";
        if (seen || old.querySelectorAll("img").length !== section.querySelectorAll("img").length) {
          old.innerHTML = html;
          report.wireSamples(step);
          if (focused) document.getElementById("sample-step")?.focus();
        }
      } else {
        const open = [...old.querySelectorAll("details")].map((d) => d.open);
        old.innerHTML = html;
        old.querySelectorAll("details").forEach((d, i) => { d.open = open[i] ?? d.open; });
      }
    }
    document.title = page.title;
  }

  /* The page as it is now; null where it is as it was, or nobody answers. */
  async function ask() {
    const note = document.getElementById("lost");
    try {
      const answer = await fetch(location.pathname, { cache: "no-cache" });
      const [before, text] = [tag, await answer.text()];
      note.hidden = answer.ok;
      if (answer.ok) tag = answer.headers.get("ETag");
      return answer.ok && tag !== before ? text : null;
    } catch {
      note.hidden = false;
      return null;
    }
  }

  async function look() {
    const began = performance.now();
    const text = document.hidden ? null : await ask();
    if (text) renew(new DOMParser().parseFromString(text, "text/html"));
    setTimeout(look, Math.max(every, 10 * (performance.now() - began)));
  }
  setTimeout(look, every);
})();
