// From groups of arguments to the flat list of a schema: what an operator's entry takes is written once for all
// devices.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

namespace nce {

template <class... Types>
struct TypeList {
  static constexpr size_t size = sizeof...(Types);
};

// Arguments of a schema that make up one parameter: the fields of a group, which lists their types as `Fields`, or the
// parameter itself.
template <class Parameter, class = void>
struct FieldsOf : std::type_identity<TypeList<Parameter>> {
  static constexpr bool is_group = false;
};
template <class Group>
struct FieldsOf<Group, std::void_t<typename Group::Fields>> : std::type_identity<typename Group::Fields> {
  static constexpr bool is_group = true;
};

template <class... Lists>
struct Concatenated;
template <class... Types>
struct Concatenated<TypeList<Types...>> : std::type_identity<TypeList<Types...>> {};
template <class... First, class... Second, class... Rest>
struct Concatenated<TypeList<First...>, TypeList<Second...>, Rest...>
    : Concatenated<TypeList<First..., Second...>, Rest...> {};

template <auto Run, class Result, class Parameters, class Arguments>
struct Flattened;
template <auto Run, class Result, class... Parameters, class... Arguments>
struct Flattened<Run, Result, TypeList<Parameters...>, TypeList<Arguments...>> {
  static Result call(Arguments... arguments) {
    std::tuple<Arguments...> all(std::move(arguments)...);
    return run(all, std::index_sequence_for<Parameters...>{});
  }

 private:
  template <size_t... I>
  static Result run(std::tuple<Arguments...>& all, std::index_sequence<I...>) {
    return Run(parameter<Parameters, first_argument(I)>(all)...);
  }

  static constexpr size_t first_argument(size_t parameter) {
    constexpr size_t sizes[] = {FieldsOf<Parameters>::type::size...};
    size_t first = 0;
    for (size_t i = 0; i < parameter; ++i) first += sizes[i];
    return first;
  }

  template <class Parameter, size_t First>
  static Parameter parameter(std::tuple<Arguments...>& all) {
    if constexpr (FieldsOf<Parameter>::is_group) {
      return group<Parameter, First>(all, std::make_index_sequence<FieldsOf<Parameter>::type::size>{});
    } else {
      return std::move(std::get<First>(all));
    }
  }

  template <class Group, size_t First, size_t... I>
  static Group group(std::tuple<Arguments...>& all, std::index_sequence<I...>) {
    return Group{std::move(std::get<First + I>(all))...};
  }
};

// Operator<&f>::call is f with each group among its parameters replaced by the group's fields, as TORCH_BOX takes it.
template <auto Run, class Function = decltype(Run)>
struct Operator;
template <auto Run, class Result, class... Parameters>
struct Operator<Run, Result (*)(Parameters...)>
    : Flattened<Run, Result, TypeList<std::remove_cvref_t<Parameters>...>,
                typename Concatenated<typename FieldsOf<std::remove_cvref_t<Parameters>>::type...>::type> {};

}  // namespace nce
