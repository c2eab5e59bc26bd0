// Sets the theme that the user chose before the page is drawn: a module would come too late, and the page flash.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("zero2all.choices")).theme ?? "";
} catch {
  // Nothing is chosen: the system's theme stays.
}
