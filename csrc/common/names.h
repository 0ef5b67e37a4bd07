// Names that Python reads: those of choices, which are enums here, and those of the columns of tables. One list makes the
// C++ and the names, so that they cannot drift apart; Python looks positions up here and keeps none of its own.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <utility>

#include "common/check.h"

// A name without arithmetic of its own does not compile, where a switch over the enum has no default.
#pragma GCC diagnostic error "-Wswitch"

// An enum with one value per name.
#define LVRPO_CHOICES(Kind, ...)             \
  enum class Kind : int64_t { __VA_ARGS__ }; \
  constexpr std::string_view names_of(Kind) { return #__VA_ARGS__; }

// A struct with one field per name, all of one type: a row of a tensor.
#define LVRPO_TABLE(Table, type, ...)                        \
  struct Table {                                             \
    type __VA_ARGS__;                                        \
    static constexpr std::string_view NAMES = #__VA_ARGS__;  \
  }

namespace lvrpo {

constexpr int64_t count_names(std::string_view names) {
  int64_t count = 1;
  for (const char c : names) count += c == ',';
  return count;
}

template <typename Kind>
inline constexpr int64_t CHOICES_OF = count_names(names_of(Kind{}));

template <typename Table>
inline constexpr int64_t COLUMNS_OF = count_names(Table::NAMES);

// All values of an enum, for a template that has one instance for each.
template <typename Kind>
using all_of = std::make_integer_sequence<int64_t, CHOICES_OF<Kind>>;

// The choice that Python looked up.
template <typename Kind>
Kind as_choice(int64_t number, const char* name) {
  LVRPO_CHECK(number >= 0 && number < CHOICES_OF<Kind>, name, " is ", number, ", expected below ", CHOICES_OF<Kind>);
  return static_cast<Kind>(number);
}

// By op, by choice or table: the names, with commas between them.
using NameLists = std::map<std::string, std::map<std::string, std::string_view>>;

struct Names {
  NameLists choices, tables;

  static Names& all() {
    static Names names;
    return names;
  }
};

// What the file of an op declares, once, for `lvrpo._C.choices` and `lvrpo._C.tables`.
struct DeclareNames {
  using List = std::initializer_list<std::pair<const std::string, std::string_view>>;

  DeclareNames(const char* op, List choices, List tables) {
    Names::all().choices[op] = choices;
    Names::all().tables[op] = tables;
  }
};

}  // namespace lvrpo
