//! Which packages a system is made of: those that are asked for, and all that these need (deb-control(5), Debian Policy 7).
//!
//! Like debootstrap's, not like apt's: of each name the newest version alone is looked at, recommendations are not followed, and
//! what was decided stays decided. That suffices for a release of a distribution, whose packages fit together.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use crate::packages::{Package, Priority, compare_versions};

/// What a package needs and nothing gives.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{package} needs {needs}, which is not to be had")]
pub struct Unmet {
    /// The package, or `the system` for what was asked for.
    pub package: String,
    /// Its dependency as written, with all alternatives.
    pub needs: String,
}

/// One of a dependency's alternatives, or one name that a package provides: `name (>= version)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Relation<'a> {
    name: &'a str,
    version: Option<(&'a str, &'a str)>,
}

impl<'a> Relation<'a> {
    fn parse(text: &'a str) -> Self {
        let (name, rest) = text.split_once('(').unwrap_or((text, ""));
        // `name:any`: one of any architecture will do.
        let name = name.split(':').next().unwrap_or(name).trim();
        let stated = rest.split(')').next().unwrap_or(rest).trim();
        let digits = stated.find(|c| !"<=>".contains(c)).unwrap_or(stated.len());
        let (operator, version) = stated.split_at(digits);
        Self { name, version: (!operator.is_empty()).then(|| (operator, version.trim())) }
    }

    /// Whether `version` is one that this asks for.
    fn fits(&self, version: &str) -> bool {
        let Some((operator, wanted)) = self.version else { return true };
        let order = compare_versions(version, wanted);
        match operator {
            "<<" => order == Ordering::Less,
            "<=" | "<" => order != Ordering::Greater,
            "=" => order == Ordering::Equal,
            ">=" | ">" => order != Ordering::Less,
            ">>" => order == Ordering::Greater,
            _ => false,
        }
    }
}

/// All packages by the names under which they can be had.
struct Universe<'a> {
    own: HashMap<&'a str, &'a Package>,
    provided: HashMap<&'a str, Vec<(Relation<'a>, &'a Package)>>,
}

impl<'a> Universe<'a> {
    fn new(packages: &'a [Package]) -> Self {
        let mut own: HashMap<&str, &Package> = HashMap::new();
        for one in packages {
            let package = one;
            let newest = own.entry(&package.name).or_insert(one);
            if compare_versions(&package.version, &newest.version) == Ordering::Greater {
                *newest = one;
            }
        }
        let mut provided: HashMap<&str, Vec<_>> = HashMap::new();
        for one in own.values() {
            for relation in one.provides.split(',').map(Relation::parse) {
                provided.entry(relation.name).or_default().push((relation, *one));
            }
        }
        Self { own, provided }
    }

    /// The packages that satisfy a relation, best first: the one of that name, then those that the system wants most.
    fn candidates(&self, wanted: &Relation) -> Vec<&'a Package> {
        let own = self.own.get(wanted.name).filter(|one| wanted.fits(&one.version));
        let stands_for = |(as_what, _): &&(Relation, &'a Package)| match (wanted.version, as_what.version) {
            (None, _) => true,
            // A relation to a version is met only by a version that is provided (Policy 7.5).
            (Some(_), Some((_, version))) => wanted.fits(version),
            (Some(_), None) => false,
        };
        let others = self.provided.get(wanted.name).into_iter().flatten();
        let mut others: Vec<&'a Package> = others.filter(stands_for).map(|(_, one)| *one).collect();
        others.sort_by_key(|one| (one.priority, one.name.as_str()));
        own.copied().into_iter().chain(others).collect()
    }

    /// Whether a system with the packages `installed` meets a relation by one of those, but for what is to be replaced.
    fn has(&self, installed: &HashMap<&str, &str>, replaced: &HashSet<&str>, wanted: &Relation) -> bool {
        let stays = |name: &str| installed.get(name).filter(|_| !replaced.contains(name));
        // In which version an older one provides a name is not known.
        let provides = |one: &&Package| {
            stays(&one.name).is_some_and(|version| wanted.version.is_none() || *version == one.version)
        };
        stays(wanted.name).is_some_and(|version| wanted.fits(version))
            || self.candidates(wanted).iter().any(provides)
    }

    /// The packages that the system has in an older version, and whose newest asks for exactly the newest of `renewed`: of one
    /// source, they go together.
    fn tied(&self, installed: &HashMap<&str, &str>, renewed: &Package) -> Vec<&'a Package> {
        let asks = |one: &Package| {
            let mut relations = one.needs().flat_map(|clause| clause.split('|').map(Relation::parse));
            relations.any(|to| to.name == renewed.name && to.version.is_some_and(|(how, _)| how == "="))
        };
        let older = |one: &&Package| installed.get(one.name.as_str()).is_some_and(|old| *old != one.version);
        let mut tied: Vec<&Package> =
            self.own.values().copied().filter(older).filter(|one| asks(one)).collect();
        tied.sort_by_key(|one| one.name.as_str());
        tied
    }
}

/// The essential and required packages, those of `wanted`, and all that they need; by name. Names that begin with `?` may be
/// missing from the archive. Where a need can be met in several ways, what is already chosen comes first, then the
/// alternatives in their order.
pub fn resolve<'a>(packages: &'a [Package], wanted: &[&str]) -> Result<Vec<&'a Package>, Unmet> {
    let universe = Universe::new(packages);
    let mut chosen: HashSet<&str> = HashSet::new();
    let mut queue: Vec<&Package> = Vec::new();
    for name in wanted {
        let found = universe.candidates(&Relation { name: name.trim_start_matches('?'), version: None });
        match found.first() {
            Some(one) if chosen.insert(&one.name) => queue.push(one),
            Some(_) => {}
            None if name.starts_with('?') => {}
            None => return Err(Unmet { package: "the system".into(), needs: (*name).to_owned() }),
        }
    }
    let mut base: Vec<&Package> = universe.own.values().copied().collect();
    base.retain(|one| one.essential || one.priority == Priority::Required);
    base.sort_by_key(|one| one.name.as_str());
    queue.extend(base.into_iter().filter(|one| chosen.insert(&one.name)));
    complete(&universe, &HashMap::new(), chosen, &mut queue)?;
    queue.sort_by_key(|one| one.name.as_str());
    Ok(queue)
}

/// What a system gets beside what it has.
#[derive(Debug)]
pub struct More<'a> {
    /// What was asked for, as far as the system has it not.
    pub wanted: Vec<&'a Package>,
    /// What that needs; also newer versions of packages that the system has.
    pub needed: Vec<&'a Package>,
}

/// What a system that has the packages `installed` (versions by names) needs to have those of `wanted`, too.
///
/// What the archive has in a newer version than the system stays as it is, unless something asks for the newer one; then those that
/// ask for exactly the old one are renewed with it.
pub fn resolve_more<'a>(
    packages: &'a [Package],
    installed: &HashMap<&str, &str>,
    wanted: &[&str],
) -> Result<More<'a>, Unmet> {
    let universe = Universe::new(packages);
    let (mut chosen, mut queue) = (HashSet::new(), Vec::new());
    for name in wanted {
        let relation = Relation { name, version: None };
        if universe.has(installed, &chosen, &relation) {
            continue;
        }
        let found = universe.candidates(&relation).first().copied();
        let one = found.ok_or_else(|| Unmet { package: "the system".into(), needs: (*name).to_owned() })?;
        if chosen.insert(one.name.as_str()) {
            queue.push(one);
        }
    }
    let count = queue.len();
    complete(&universe, installed, chosen, &mut queue)?;
    let needed = queue.split_off(count);
    Ok(More { wanted: queue, needed })
}

/// Appends to `queue`, whose packages' names are in `chosen`, all that they need and that `installed` does not give.
fn complete<'a>(
    universe: &Universe<'a>,
    installed: &HashMap<&str, &str>,
    mut chosen: HashSet<&'a str>,
    queue: &mut Vec<&'a Package>,
) -> Result<(), Unmet> {
    // In the order of their being chosen: a queue whose head moves on.
    let mut next = 0;
    while let Some(package) = queue.get(next).copied() {
        next += 1;
        for clause in package.needs() {
            let relations = || clause.split('|').map(Relation::parse);
            let candidates: Vec<&Package> =
                relations().flat_map(|relation| universe.candidates(&relation)).collect();
            if candidates.iter().any(|one| chosen.contains(one.name.as_str()))
                || relations().any(|relation| universe.has(installed, &chosen, &relation))
            {
                continue;
            }
            let unmet = || Unmet { package: package.name.clone(), needs: clause.to_owned() };
            let one = candidates.first().ok_or_else(unmet)?;
            chosen.insert(&one.name);
            queue.push(one);
        }
        if installed.contains_key(package.name.as_str()) {
            let mut tied = universe.tied(installed, package);
            tied.retain(|one| chosen.insert(&one.name));
            queue.extend(tied);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages;

    /// An index of paragraphs of `name version`, and more fields.
    fn index(packages: &[(&str, &str, &str)]) -> Vec<Package> {
        let digest = "0".repeat(64);
        let paragraph = |(name, version, more): &(&str, &str, &str)| {
            format!(
                "Package: {name}\nVersion: {version}\nFilename: {name}\nSize: 1\nSHA256: {digest}\n{more}\n\n"
            )
        };
        let text: String = packages.iter().map(paragraph).collect();
        packages::read(text.as_bytes(), 0, |_| true).unwrap()
    }

    fn names(packages: &[(&str, &str, &str)], wanted: &[&str]) -> Result<String, String> {
        let found = index(packages);
        let found = resolve(&found, wanted).map_err(|error| error.to_string())?;
        let names: Vec<_> = found.iter().map(|one| format!("{}={}", one.name, one.version)).collect();
        Ok(names.join(" "))
    }

    #[test]
    fn the_base_and_what_is_wanted_come_with_all_that_they_need() {
        let packages = [
            ("dpkg", "1", "Essential: yes\nPre-Depends: libc (>= 2)\nDepends: tar"),
            ("libc", "2", ""),
            ("tar", "1", ""),
            ("mount", "1", "Priority: required"),
            ("nano", "1", "Priority: important"),
            ("ssh", "1", "Depends: lib-ssl, libc"),
            ("lib-ssl", "1", "Depends: ssh"),
            ("lib-ssl", "2", "Depends: ssh, libc (>= 2), lib-new"),
            ("lib-new", "1:0", "Recommends: nano"),
        ];
        let expected = "dpkg=1 lib-new=1:0 lib-ssl=2 libc=2 mount=1 ssh=1 tar=1";
        assert_eq!(names(&packages, &["ssh", "?gone"]).unwrap(), expected, "cycles end, the newest wins");
    }

    #[test]
    fn alternatives_are_taken_in_order_unless_one_is_there() {
        let packages = [
            ("a", "1", "Depends: gone | first | second"),
            ("first", "1", ""),
            ("second", "1", ""),
            ("b", "1", "Depends: first (>= 2) | second (<< 2) | first"),
        ];
        assert_eq!(names(&packages, &["a"]).unwrap(), "a=1 first=1");
        assert_eq!(names(&packages, &["a", "second"]).unwrap(), "a=1 second=1");
        assert_eq!(names(&packages, &["b"]).unwrap(), "b=1 second=1");
    }

    #[test]
    fn provided_names_stand_for_their_packages() {
        let packages = [
            ("a", "1", "Depends: mta"),
            ("b", "1", "Depends: libx (>= 3), libx:any"),
            ("exim", "4", "Provides: mta"),
            ("dma", "4", "Provides: foo, mta\nPriority: standard"),
            ("libx-t64", "9", "Provides: libx (= 3.1)"),
            ("old", "1", "Provides: libx"),
        ];
        assert_eq!(names(&packages, &["a"]).unwrap(), "a=1 dma=4");
        assert_eq!(names(&packages, &["exim", "a"]).unwrap(), "a=1 exim=4");
        assert_eq!(names(&packages, &["b"]).unwrap(), "b=1 libx-t64=9", "a version is met only by a version");
    }

    #[test]
    fn what_is_missing_is_named_with_who_needs_it() {
        let packages = [("a", "1", "Depends: b"), ("b", "1", "Depends: c (>= 2) | d, a"), ("c", "1", "")];
        assert_eq!(names(&packages, &["a"]).unwrap_err(), "b needs c (>= 2) | d, which is not to be had");
        assert_eq!(names(&packages, &["x"]).unwrap_err(), "the system needs x, which is not to be had");
    }

    /// What comes beside `installed`: what is wanted, and what that needs.
    fn more(
        packages: &[(&str, &str, &str)],
        installed: &[(&str, &str)],
        wanted: &[&str],
    ) -> Result<[String; 2], String> {
        let found = index(packages);
        let found = resolve_more(&found, &installed.iter().copied().collect(), wanted);
        let More { wanted, needed } = found.map_err(|error| error.to_string())?;
        Ok([wanted, needed].map(|some| {
            let names: Vec<_> = some.iter().map(|one| format!("{}={}", one.name, one.version)).collect();
            names.join(" ")
        }))
    }

    #[test]
    fn a_system_gets_what_it_has_not() {
        let packages = [
            ("dpkg", "1", "Essential: yes\nDepends: tar"),
            ("libc", "2", "Provides: libc-dev (= 2)"),
            ("jq", "1", "Depends: libjq (= 1), libc (>= 2), libc-dev (>= 2)"),
            ("libjq", "1", "Depends: libc | other, mta"),
            ("exim", "1", "Provides: mta"),
            ("dma", "1", "Provides: mta"),
            ("other", "1", ""),
        ];
        let installed = [("libc", "2"), ("exim", "0"), ("gone", "1")];
        let got = more(&packages, &installed, &["jq", "libc", "gone", "mta"]).unwrap();
        assert_eq!(got, ["jq=1", "libjq=1"], "nothing of what is there, nor of what every system has");
        assert_eq!(more(&packages, &installed, &["libc"]).unwrap(), ["", ""]);
        let error = more(&packages, &installed, &["jq", "nothing"]).unwrap_err();
        assert!(error.contains("needs nothing"), "{error}");
    }

    #[test]
    fn what_the_archive_has_newer_comes_only_where_it_is_asked_for() {
        let packages = [
            ("lib", "3", ""),
            ("lib-data", "3", "Depends: lib (= 3)"),
            ("lib-tools", "3", "Depends: lib (= 3), lib-extra (= 3)"),
            ("lib-extra", "3", ""),
            ("lib-user", "3", "Depends: lib (>= 2)"),
            ("old", "1", "Depends: lib (>= 1)"),
            ("new", "1", "Depends: lib (>= 3)"),
            ("newest", "1", "Depends: lib (>= 4)"),
        ];
        let installed = [("lib", "2"), ("lib-data", "2"), ("lib-tools", "2"), ("lib-user", "2")];
        assert_eq!(more(&packages, &installed, &["old"]).unwrap(), ["old=1", ""]);
        let needed = "lib=3 lib-data=3 lib-tools=3 lib-extra=3";
        assert_eq!(more(&packages, &installed, &["new"]).unwrap(), ["new=1", needed]);
        let error = more(&packages, &installed, &["newest"]).unwrap_err();
        assert_eq!(error, "newest needs lib (>= 4), which is not to be had");
    }
}
