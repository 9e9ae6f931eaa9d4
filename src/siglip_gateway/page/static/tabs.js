// The tabs, by the pattern of WAI-ARIA: arrows, Home and End move, and the address keeps the tab.

/** Set the tabs up. `shown` is called with a tab's name when it is shown. */
export function setUpTabs(list, shown) {
  const tabs = [...list.querySelectorAll('[role="tab"]')];
  const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
  const nameOf = (tab) => tab.getAttribute("aria-controls");

  function show(tab, focus) {
    for (const other of tabs) {
      const selected = other === tab;
      other.setAttribute("aria-selected", String(selected));
      other.tabIndex = selected ? 0 : -1;
      panelOf(other).hidden = !selected;
    }
    if (focus) tab.focus();
    tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    shown(nameOf(tab));
  }

  function fromAddress() {
    show(tabs.find((tab) => `#${nameOf(tab)}` === location.hash) ?? tabs[0], false);
  }

  function choose(tab) {
    history.replaceState(null, "", `#${nameOf(tab)}`);
    show(tab, true);
  }

  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  list.addEventListener("keydown", (event) => {
    const index = tabs.indexOf(document.activeElement);
    const target = {
      ArrowRight: tabs[(index + 1) % tabs.length],
      ArrowLeft: tabs[(index - 1 + tabs.length) % tabs.length],
      Home: tabs[0],
      End: tabs[tabs.length - 1],
    }[event.key];
    if (index < 0 || !target) return;
    event.preventDefault();
    choose(target);
  });
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
}
