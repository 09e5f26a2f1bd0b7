//! What the figures say.

use std::collections::BTreeSet;

use super::{Column, Workload};
use crate::monitor::median;

/// Engines that are compared with, rather than compared.
const BASES: [&str; 2] = ["native", "tcg"];

impl Column {
    /// The median of a workload's processor time, nanoseconds.
    fn cpu(&self, name: &str) -> Option<f64> {
        let samples = self.samples.get(name)?;
        Some(median(samples.iter().map(|s| s.cpu as f64)))
    }

    /// The median of a workload's time on the clock for an iteration, nanoseconds.
    fn wall_each(&self, name: &str) -> Option<f64> {
        let samples = self.samples.get(name)?;
        Some(median(samples.iter().map(|s| s.wall as f64 / s.iterations as f64)))
    }

    /// How much more two threads do than one in the same time.
    fn scaling(&self) -> Option<f64> {
        Some(2.0 * self.wall_each("sum-1")? / self.wall_each("sum-2")?)
    }
}

/// What is printed for each workload beside its time on the host: the ratio of two engines' times.
struct Ratio<'a> {
    title: String,
    over: &'a Column,
    under: &'a Column,
}

impl Ratio<'_> {
    fn of(&self, name: &str) -> Option<f64> {
        Some(self.over.cpu(name)? / self.under.cpu(name)?)
    }

    fn geomean<'a>(&self, names: impl Iterator<Item = &'a str>) -> Option<f64> {
        let logs: Vec<f64> = names.filter_map(|name| self.of(name)).map(f64::ln).collect();
        (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
    }
}

fn find<'a>(columns: &'a [(String, Column)], engine: &str) -> Option<&'a Column> {
    columns.iter().find(|(name, _)| name == engine).map(|(_, column)| column)
}

fn ratios(columns: &[(String, Column)]) -> Vec<Ratio<'_>> {
    let (native, tcg) = (find(columns, "native"), find(columns, "tcg"));
    let to_native = columns.iter().filter(|(engine, _)| engine != "native");
    let slower = to_native
        .filter_map(|(engine, over)| Some(Ratio { title: format!("{engine}/native"), over, under: native? }));
    let lodge = columns.iter().filter(|(engine, _)| !BASES.contains(&engine.as_str()));
    let faster =
        lodge.filter_map(|(engine, under)| Some(Ratio { title: format!("tcg/{engine}"), over: tcg?, under }));
    slower.chain(faster).collect()
}

fn row(first: &str, second: &str, cells: impl Iterator<Item = Option<String>>) {
    let cells: String = cells.map(|cell| format!("{:>20}", cell.unwrap_or("-".into()))).collect();
    println!("{first:16}{second:>12}{cells}");
}

fn number(value: f64) -> String {
    format!("{value:.2}")
}

/// Prints a row for each workload and category, a column for each ratio.
pub fn print(workloads: &[Workload], columns: &[(String, Column)]) {
    let ratios = ratios(columns);
    let native = find(columns, "native");
    println!();
    row("host CPU time", "native ms", ratios.iter().map(|ratio| Some(ratio.title.clone())));
    for (name, _) in workloads {
        let time = native.and_then(|column| column.cpu(name)).map(|time| format!("{:.1}", time / 1e6));
        let cells = ratios.iter().map(|ratio| ratio.of(name).map(number));
        row(name, &time.unwrap_or("-".into()), cells);
    }
    println!("geometric means");
    let mut categories: Vec<&str> = workloads.iter().map(|(_, category)| category.as_str()).collect();
    categories.dedup();
    for category in categories.iter().copied().chain(["all"]) {
        let names = || {
            workloads.iter().filter(move |(_, c)| category == "all" || c == category).map(|(n, _)| n.as_str())
        };
        row(category, "", ratios.iter().map(|ratio| ratio.geomean(names()).map(number)));
    }
    let sorted = |ratio: &Ratio| -> Vec<(f64, String)> {
        let mut all: Vec<_> = workloads
            .iter()
            .filter_map(|(n, _)| Some((ratio.of(n)?, format!("{n} {:.2}", ratio.of(n)?))))
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all
    };
    row("lowest", "", ratios.iter().map(|ratio| sorted(ratio).first().map(|(_, text)| text.clone())));
    row("highest", "", ratios.iter().map(|ratio| sorted(ratio).last().map(|(_, text)| text.clone())));
}

/// Prints what else there is to say of each engine.
pub fn print_engines(columns: &[(String, Column)], cpus: u32) {
    let tcg = find(columns, "tcg").and_then(|tcg| tcg.boot);
    println!();
    let titles = ["boot wall s", "tcg/", "scaling", "memory MiB"].map(|title| Some(title.into()));
    row("", "boot CPU s", titles.into_iter());
    for (engine, column) in columns {
        let [cpu, wall] = [0, 1].map(|n| column.boot.map(|boot| boot[n]));
        let faster = tcg.zip(cpu).map(|(tcg, cpu)| tcg[0] / cpu);
        let scaling = column.scaling().filter(|_| cpus > 1);
        let cells = [wall, faster, scaling, Some(column.memory)].map(|value| value.map(number));
        row(engine, &cpu.map_or("-".into(), number), cells.into_iter());
    }
}

/// Workloads that failed, and those whose checksums differ.
pub fn errors(workloads: &[Workload], columns: &[(String, Column)]) -> Vec<String> {
    let mut errors = Vec::new();
    for (name, _) in workloads {
        for (engine, column) in columns {
            errors.extend(column.failures.get(name).map(|why| format!("{name} on {engine}: {why}")));
        }
        let sums = columns.iter().flat_map(|(engine, column)| {
            let samples = column.samples.get(name).into_iter().flatten();
            samples.map(move |sample| (sample.checksum.as_str(), engine.as_str()))
        });
        let sums: BTreeSet<(&str, &str)> = sums.collect();
        if sums.iter().any(|(sum, _)| Some(sum) != sums.first().map(|(sum, _)| sum)) {
            errors.push(format!("{name}: checksums differ: {sums:?}"));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Sample;

    fn column(samples: &[(&str, u64, &str)]) -> Column {
        let mut column = Column::default();
        for (name, cpu, checksum) in samples {
            let sample =
                Sample { cpu: *cpu, wall: *cpu, seen: [0, 0], iterations: 10, checksum: (*checksum).into() };
            column.samples.entry((*name).into()).or_default().push(sample);
        }
        column
    }

    #[test]
    fn ratios_are_of_medians_and_engines_are_compared_with_both_bases() {
        let columns = [
            ("native".into(), column(&[("a", 10, "x"), ("b", 20, "y")])),
            ("tcg".into(), column(&[("a", 80, "x"), ("a", 70, "x"), ("a", 900, "x"), ("b", 40, "y")])),
            ("new".into(), column(&[("a", 20, "x")])),
        ];
        let ratios = ratios(&columns);
        let titles: Vec<&str> = ratios.iter().map(|ratio| ratio.title.as_str()).collect();
        assert_eq!(titles, ["tcg/native", "new/native", "tcg/new"]);
        assert_eq!(ratios.iter().map(|ratio| ratio.of("a")).collect::<Vec<_>>(), [8.0, 2.0, 4.0].map(Some));
        // 8 and 2; where an engine has no figure, the workload is left out.
        assert!(ratios[0].geomean(["a", "b"].into_iter()).is_some_and(|mean| (mean - 4.0).abs() < 1e-9));
        assert!(ratios[1].geomean(["a", "b"].into_iter()).is_some_and(|mean| (mean - 2.0).abs() < 1e-9));
        assert_eq!(ratios[1].geomean(["b"].into_iter()), None);
    }

    #[test]
    fn other_checksums_are_errors_between_engines_and_between_rounds() {
        let workloads: Vec<Workload> = ["a", "b"].map(|name| (name.into(), "integer".into())).into();
        let native = || ("native".into(), column(&[("a", 1, "x"), ("b", 1, "y")]));
        assert!(errors(&workloads, &[native(), ("tcg".into(), column(&[("a", 1, "x")]))]).is_empty());
        let found = errors(&workloads, &[native(), ("tcg".into(), column(&[("a", 1, "x"), ("a", 1, "z")]))]);
        assert!(found.len() == 1 && found[0].starts_with("a: checksums differ"), "{found:?}");
        let mut failed = column(&[]);
        failed.failures.insert("b".into(), "the guest has gone".into());
        assert_eq!(errors(&workloads, &[native(), ("new".into(), failed)]), ["b on new: the guest has gone"]);
    }

    #[test]
    fn two_threads_that_take_no_longer_than_one_scale_by_two() {
        assert_eq!(column(&[("sum-1", 50, ""), ("sum-2", 50, "")]).scaling(), Some(2.0));
    }
}
