(() => {
  const bar = document.getElementById("filters");
  const task = document.getElementById("task");
  const search = document.getElementById("search");
  const buttons = [...bar.querySelectorAll("button")];
  const sections = [...document.querySelectorAll("section[data-task]")].map((node) => ({
    node,
    more: [...node.querySelectorAll(".more")],
    cards: [...node.querySelectorAll(".card")].map((card) => ({
      card,
      text: [...card.querySelectorAll(".find")].map((n) => n.textContent).join("\n").toLowerCase(),
    })),
  }));
  const total = sections.reduce((sum, section) => sum + section.cards.length, 0);
  let kind = "";
  const apply = () => {
    const words = search.value.trim().toLowerCase();
    let shown = 0;
    for (const { node, more, cards } of sections) {
      const chosen = !task.value || node.dataset.task === task.value;
      let here = 0;
      for (const { card, text } of cards) {
        const fits = chosen && (!kind || card.dataset.kind === kind) && text.includes(words);
        card.hidden = !fits;
        here += fits;
      }
      for (const note of more) note.hidden = Boolean(words) || (kind && note.dataset.kind !== kind);
      node.hidden = !here;
      shown += here;
    }
    document.getElementById("status").textContent = `${shown} of ${total} cards`;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      kind = button.dataset.kind;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
  }
  task.addEventListener("change", apply);
  search.addEventListener("input", apply);
  bar.hidden = false;
  apply();
})();
